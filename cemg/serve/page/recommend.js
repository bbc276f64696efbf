// A history or a user, options, and the recommendations.
import { briefly, call } from "./api.js";
import { Suggest } from "./suggest.js";
import { Tree } from "./tree.js";
import { Picture, Problem, html, itemLink, percent, useEffect, useRead, useRef, useState } from "./ui.js";

const NEWEST = 12; // items of a user's history that are shown
const suggestedItems = async (query) => {
  const { items } = await call(`v1/items?${new URLSearchParams({ query, limit: 8 })}`);
  return items.filter((item) => item.state === "active").map((item) => ({ value: item.item_id, text: item.title || item.item_id }));
};
const suggestedUsers = async (query) => {
  const { users } = await call(`v1/users?${new URLSearchParams({ query, limit: 8 })}`);
  return users.map((user) => ({ value: user, text: user }));
};

export function Recommend() {
  const [way, setWay] = useState("history");
  const [history, setHistory] = useState([]);
  const [user, setUser] = useState("");
  const [options, setOptions] = useState({ limit: "10", exclude: "default", exact: false, explain: true, filter: "" });
  const [result, setResult] = useState({});
  const running = useRef(null);
  const set = (name) => (event) => setOptions({
    ...options, [name]: event.target.type === "checkbox" ? event.target.checked : event.target.value,
  });

  const submit = async (event) => {
    event.preventDefault();
    running.current?.abort();
    const control = running.current = new AbortController();
    setResult({ busy: true });
    try {
      const body = request(way, history, user, options);
      const answer = await call("v1/recommend", { body, signal: control.signal });
      const items = await Promise.all(answer.items.map(async (item) => ({ ...item, image: await briefly(item.item_id).then((one) => one.image, () => false) })));
      if (running.current === control) setResult({ answer: { ...answer, items }, limit: body.limit });
    } catch (error) {
      if (running.current === control) setResult({ error });
    }
  };

  return html`<section aria-labelledby="recommend-title">
    <h2 id="recommend-title">Recommendations</h2>
    <form onSubmit=${submit}>
      <fieldset class="ways"><legend>For</legend>
        ${[["history", "a history"], ["user", "a user"]].map(([value, text]) => html`<label>
          <input type="radio" name="way" value=${value} checked=${way === value} onChange=${() => setWay(value)}/> ${text}</label>`)}
      </fieldset>
      ${way === "history"
        ? html`<${History} history=${history} change=${setHistory}/>`
        : html`<${User} user=${user} change=${setUser}/>`}
      <div class="options">
        <div><label for="limit">Items</label>
          <input id="limit" type="number" min="1" max="1000" required value=${options.limit} onInput=${set("limit")}/></div>
        <div><label for="exclude">Items of the history</label>
          <select id="exclude" value=${options.exclude} onChange=${set("exclude")}>
            <option value="default">as the run was fitted</option>
            <option value="yes">leave out</option>
            <option value="no">may return</option>
          </select></div>
        <label class="check"><input id="exact" type="checkbox" checked=${options.exact} onChange=${set("exact")}/> Exact: search until the list is proven</label>
        <label class="check"><input id="explain" type="checkbox" checked=${options.explain} onChange=${set("explain")}/> Show what the memory and the generator contribute</label>
      </div>
      <div><label for="filter">Filter (JSON, optional)</label>
      <textarea id="filter" rows="2" spellcheck=${false} value=${options.filter} onInput=${set("filter")}
        placeholder='{"must": [{"key": "price", "range": {"lte": 20}}]}'></textarea></div>
      <div class="actions"><button type="submit" aria-busy=${Boolean(result.busy)}>Recommend</button></div>
    </form>
    <div aria-live="polite">
      ${result.busy && html`<p class="soft">Searching …</p>`}
      <${Problem} error=${result.error}/>
      ${result.answer && html`<${Answer} answer=${result.answer} limit=${result.limit}/>`}
    </div>
    ${result.answer && html`<${Tree} items=${result.answer.items}/>`}
  </section>`;
}

function request(way, history, user, options) {
  const body = { limit: Number(options.limit), exact: options.exact, explain: options.explain };
  if (way === "user") {
    if (!user) throw new Error("choose a user first");
    body.user_id = user;
  } else {
    body.history = history;
  }
  if (options.exclude !== "default") body.exclude_history = options.exclude === "yes";
  if (options.filter.trim()) {
    try {
      body.filter = JSON.parse(options.filter);
    } catch (error) {
      throw new Error(`the filter is not JSON: ${error.message}`);
    }
  }
  return body;
}

/** The title of an item, or its id while it is read and if it has none. */
function Title({ id }) {
  const { value } = useRead(() => briefly(id), [id]);
  return value?.title || id;
}

function History({ history, change }) {
  return html`<div>
    <${Suggest} id="add" label="Add an item by id or title, oldest first" read=${suggestedItems} take=${(id) => change([...history, id])}/>
    ${history.length
      ? html`<ol class="chips" aria-label="History">${history.map((id, place) => html`<li key=${`${place}-${id}`}>
          <${Title} id=${id}/>
          <button type="button" class="remove" aria-label="Remove ${id} from the history" onClick=${() => change(history.filter((_, other) => other !== place))}>×</button></li>`)}</ol>`
      : html`<p class="soft">The history is empty: the most popular items are recommended.</p>`}
  </div>`;
}

function User({ user, change }) {
  const { value, error } = useRead(async () => (user ? call(`v1/users/${encodeURIComponent(user)}`) : null), [user]);
  const newest = value?.history.slice(-NEWEST) ?? [];
  return html`<div>
    <${Suggest} id="user" label="User" read=${suggestedUsers} take=${change} keep placeholder="the beginning of an id"/>
    <${Problem} error=${error}/>
    ${value && html`<p class="soft">User ${value.user_id}: ${value.history.length} ${value.history.length === 1 ? "item" : "items"}${value.history.length > NEWEST ? `, the newest ${NEWEST} of them are` : ""}</p>
      <ol class="chips" aria-label="History of the user">${newest.map((id, place) => html`<li key=${`${place}-${id}`}><a href=${itemLink(id)}><${Title} id=${id}/></a></li>`)}</ol>`}
  </div>`;
}

function Answer({ answer, limit }) {
  const { items, certified } = answer;
  const all = certified === items.length;
  return html`<section aria-labelledby="list-title">
    <h3 id="list-title">${items.length} ${items.length === 1 ? "item" : "items"}</h3>
    <p id="summary"><strong class=${all ? "good" : ""}>${certified} of ${items.length} certified</strong>${" "}
      <span class="soft">(proven to be the true top)</span>, ranked by ${answer.strategy}, catalog version ${answer.catalog_version}, model ${answer.model_version}.</p>
    ${!answer.complete && html`<p class="note">${items.length} of ${limit}: the catalog has no more items that may be recommended.</p>`}
    ${answer.skipped.length > 0 && html`<p class="note">Not in the catalog, so skipped: ${answer.skipped.join(", ")}</p>`}
    <ol class="list">${items.map((item, place) => html`<li key=${item.item_id}>
      <span class="rank" aria-hidden="true">${place + 1}</span>
      <${Picture} id=${item.item_id} has=${item.image}/>
      <div class="grow">
        <a href=${itemLink(item.item_id)}><strong>${item.title || item.item_id}</strong></a>
        ${place < certified && html` <span class="proof" title="proven to be in its place"><span aria-hidden="true">✓</span><span class="hidden">certified</span></span>`}
        <div class="soft">${item.item_id} · score ${item.score.toFixed(3)} (${percent(Math.exp(item.score))}) · <code class="codes">${item.codes.join(" · ")}</code></div>
        ${item.shares && html`<${Shares} shares=${item.shares} events=${item.events}/>`}
      </div></li>`)}</ol>
  </section>`;
}

const tenths = (share) => `${(100 * share).toFixed(1)} %`;

/** How much of an item's probability is from each source, and the events that the memory's part rests on. */
function Shares({ shares, events }) {
  const bar = useRef();
  const rest = 1 - (shares.generator ?? 0);
  useEffect(() => { bar.current.style.inlineSize = `${100 * rest}%`; }, [rest]);
  const parts = Object.entries(shares).sort(([, one], [, other]) => other - one);
  return html`<div class="shares">
    <span class="bar" aria-hidden="true"><span ref=${bar}></span></span>
    <span>${parts.map(([name, share]) => `${name} ${tenths(share)}`).join(", ")}</span>
    ${events?.length > 0 && html`<details><summary>rests on ${events.length} ${events.length === 1 ? "event" : "events"}</summary>
      <ol>${events.map((event) => html`<li key=${event.position}><a href=${itemLink(event.item_id)}><${Title} id=${event.item_id}/></a> ${tenths(event.share)}</li>`)}</ol>
    </details>`}
  </div>`;
}
