# %% [markdown]
# # Decode your own checkpoint
#
# You have a language model of the `transformers` library that was fine-tuned to generate semantic
# IDs, for example a T5 or a Llama. This tutorial decodes it with CEMG and compares the result with
# `generate()`.
#
# Run it with `python examples/your_own_checkpoint.py`, or cell by cell in an editor that knows
# `# %%`. It takes a few seconds on a CPU, because the model is tiny and its weights are random.

# %%
import time

import torch
from transformers import T5Config, T5ForConditionalGeneration

from cemg.decoding import Decoder
from cemg.tokenizer import Catalog
from cemg_kernels import ItemFilter

torch.manual_seed(0)

# %% [markdown]
# ## The catalog
#
# Every item has a semantic ID: one code per level, here 3 levels of 64 codes. No two items share
# all three codes. Replace `codes` by your own table, an integer tensor with one row per item.
# `Catalog.read` also reads it from the files of LETTER, LC-Rec and MiniOneRec, and from CSV and
# Parquet.

# %%
ITEMS, LEVELS, CODES = 2000, 3, 64

number = torch.randperm(CODES**LEVELS)[:ITEMS]  # a different number per item, written in base 64
codes = torch.stack([number // CODES**2, number // CODES % CODES, number % CODES], dim=1)
item_ids = [f"item-{row:04d}" for row in range(ITEMS)]
catalog = Catalog.from_codes(codes, CODES, item_ids)

# %% [markdown]
# ## The model
#
# Code `c` of level `m` must be token `FIRST_CODE_TOKEN + m * CODES + c` of the vocabulary. Here,
# tokens 0 to 2 are padding, the end of a sequence and an unknown token. Replace the next cell by
# `AutoModelForSeq2SeqLM.from_pretrained("checkpoint")`, or by `AutoModelForCausalLM` for a
# decoder-only model.

# %%
FIRST_CODE_TOKEN = 3

config = T5Config(
    vocab_size=FIRST_CODE_TOKEN + LEVELS * CODES, d_model=64, d_kv=16, d_ff=128, num_layers=2, num_heads=4,
    pad_token_id=0, eos_token_id=1, decoder_start_token_id=0,
)  # fmt: skip
model = T5ForConditionalGeneration(config).eval()

# %% [markdown]
# ## The prompts
#
# A prompt is whatever your model was trained on. Here it is the semantic IDs of the items in a
# user's history, oldest first. Both users have five items, so there is nothing to pad.

# %%
histories = torch.randint(ITEMS, (2, 5))
tokens_of_item = FIRST_CODE_TOKEN + codes + CODES * torch.arange(LEVELS)  # [ITEMS, LEVELS]
input_ids = tokens_of_item[histories].flatten(1)  # [2, 5 * LEVELS]
attention_mask = torch.ones_like(input_ids)

# %% [markdown]
# ## Decode with CEMG
#
# The decoder searches with 50 beams, and every beam stays inside the catalog. It returns the items
# of the 50 beams, best first, with their log-probabilities. The first `certified` items of each
# user are proven to be the best of the whole catalog, not only the best of what the beams have
# seen.

# %%
BEAMS = 50

decoder = Decoder(model, catalog, FIRST_CODE_TOKEN, normalize="vocab")
print(f"The decoder runs the model on this path: {decoder.path}")

started = time.perf_counter()
found = decoder.decode(input_ids, attention_mask, beams=BEAMS)
cemg_seconds = time.perf_counter() - started

for user, (ids, scores) in enumerate(zip(catalog.ids_of(found.items), found.scores.tolist(), strict=True)):
    best = ", ".join(f"{item} ({score:.2f})" for item, score in zip(ids[:3], scores[:3], strict=True))
    print(f"User {user}: {best}; {int(found.certified[user])} of {BEAMS} are certified.")

# %% [markdown]
# ## Decode with generate()
#
# `generate()` can be kept inside the catalog by a function that returns the allowed next tokens. It
# looks them up in a dictionary of prefixes. The length penalty is off, so that a score is a plain
# sum of log-probabilities.

# %%
allowed: dict[tuple[int, ...], set[int]] = {}
for row in tokens_of_item.tolist():
    for level in range(LEVELS):
        allowed.setdefault(tuple(row[:level]), set()).add(row[level])


def allowed_tokens(user: int, sequence: torch.Tensor) -> list[int]:
    """Return the tokens that continue the semantic ID of an item; the first token starts the decoder."""
    return sorted(allowed[tuple(sequence[1:].tolist())])


started = time.perf_counter()
generated = model.generate(
    input_ids, attention_mask=attention_mask, num_beams=BEAMS, num_return_sequences=BEAMS, length_penalty=0.0,
    min_new_tokens=LEVELS, max_new_tokens=LEVELS, prefix_allowed_tokens_fn=allowed_tokens,
    return_dict_in_generate=True, output_scores=True,
)  # fmt: skip
generate_seconds = time.perf_counter() - started

generated_codes = generated.sequences[:, 1:] - FIRST_CODE_TOKEN - CODES * torch.arange(LEVELS)
generated_codes = generated_codes.view(2, BEAMS, LEVELS)
generated_scores = generated.sequences_scores.view(2, BEAMS)

# %% [markdown]
# ## Compare
#
# Both searches find the same items in the same order, and their scores differ by rounding only.

# %%
same = bool((generated_codes == found.codes).all())
difference = float((generated_scores - found.scores).abs().max())
print(f"Same items in the same order: {same}. Largest difference of a score: {difference:.0e}.")
print(f"CEMG: {cemg_seconds * 1e3:.1f} ms. generate(): {generate_seconds * 1e3:.1f} ms.")

# %% [markdown]
# ## Search a part of the catalog
#
# A filter restricts the search itself, so the list is full even where few items are allowed. Here,
# 100 items are in stock.

# %%
in_stock = torch.zeros(ITEMS, dtype=torch.bool)
in_stock[torch.randperm(ITEMS)[:100]] = True
found = decoder.decode(
    input_ids, attention_mask, beams=BEAMS, filter=ItemFilter.from_mask(catalog.trie, in_stock)
)
print(f"All {found.items.shape[1]} results are in stock: {bool(in_stock[found.items].all())}.")
