# %% [markdown]
# # Quickstart
#
# This tutorial trains CEMG on a small synthetic data set, recommends items to a user, adds a new
# item to the catalog and recommends from a part of the catalog. Run it with
# `python examples/quickstart.py`, or cell by cell in an editor that knows `# %%`. It takes less than
# a minute on two CPU cores.

# %%
import shlex
import subprocess
import sys
import tempfile
from pathlib import Path

from cemg import Recommender
from cemg.artifacts import RunArtifacts

folder = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(tempfile.mkdtemp(prefix="cemg-quickstart-"))
run = folder / "run"


def shell(*words: object) -> None:
    """Print a command as you would type it, and run it."""
    command = [str(word) for word in words]
    print(f"$ {shlex.join(command)}", flush=True)
    subprocess.run(command, check=True)


# %% [markdown]
# ## Train
#
# Without `--data`, `cemg-train` makes a synthetic shop whose items have a title, a text and a
# picture. Each `--set` changes one setting: few users, small networks and few epochs, so that this
# tutorial is quick. `--without image` leaves the pictures out. On your own data, start with
# `cemg-train --interactions orders.csv --items products.csv --run runs/shop`.

# %%
settings = [
    "data.synthetic_users=300", "data.synthetic_items=120", "pca.dim=32", "graph.dim=32", "graph.epochs=20",
    "tokenizer.levels=3", "tokenizer.codebook_size=16", "tokenizer.dim=32", "tokenizer.epochs=60",
    "backbone.layers=1", "backbone.dim=32", "backbone.heads=2", "generator.epochs=16",
    "generator.learning_rate=2.0e-3", "generator.batch_size=32", "decoding.validation_users=100",
    "decoding.beams=20", "decoding.validation_beams=10",
]  # fmt: skip
options = [word for setting in settings for word in ("--set", setting)]
shell("cemg-train", "--run", run, "--without", "image", *options)

# %% [markdown]
# The folder of the run now holds the trained stages, the results of the test and a report. Open the
# report in a browser: it needs no network.

# %%
print(f"The report: {run / 'report' / 'report.html'}")

# %% [markdown]
# ## Recommend
#
# A history is a list of item ids, oldest first. `exclude_history=True` leaves out what the user
# already has.

# %%
data = RunArtifacts.open(run).load_data()
history = [data.item_ids[item] for item in data.sequences[0]]
print(f"User {data.user_ids[0]} has {', '.join(history)}.")

recommender = Recommender.from_run(run)
found = recommender.recommend(history, top=5, beams=20, exclude_history=True)
for item, title, score in zip(found.ids[0], found.titles[0], found.scores[0].tolist(), strict=True):
    print(f"{item}  {score:6.2f}  {title}")

# %% [markdown]
# ## Add an item
#
# A new item gets a semantic ID from its text. Nothing is trained again, and the semantic IDs of the
# other items stay as they are.

# %%
new_items = folder / "new.csv"
new_items.write_text("item,title,text\nitem-new,Quiet telescope,a quiet telescope for the garden\n")
shell("cemg-catalog", "add", "--run", run, "--items", new_items)
shell("cemg-catalog", "show", "--run", run, "--item", "item-new")

# %% [markdown]
# ## Recommend from a part of the catalog
#
# A filter admits some items only, for example those in stock. The search itself obeys it, so the
# list is full wherever enough items are admitted. Filters combine with `&`, `|` and `~`.

# %%
recommender = Recommender.from_run(run)  # reads the catalog with the new item
in_stock = recommender.only(["item-new", *data.item_ids[:20]])
found = recommender.recommend(history, top=5, beams=20, filter=in_stock & ~recommender.only(history))
for item, title, score in zip(found.ids[0], found.titles[0], found.scores[0].tolist(), strict=True):
    print(f"{item}  {score:6.2f}  {title}")
