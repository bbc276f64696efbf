// Find an item, and see what the service knows about it.
import { briefly, call, itemPath } from "./api.js";
import { Codes, Picture, Problem, count, html, itemLink, percent, useEffect, useRead, useRef, useState } from "./ui.js";

const PAGE = 20;
const NEAREST = 8;

export function Items({ id }) {
  return id === null ? html`<${Search}/>` : html`<${Item} id=${id} key=${id}/>`;
}

function Search() {
  const [query, setQuery] = useState(sessionStorage.getItem("cemg-query") ?? "");
  const [pages, setPages] = useState([""]); // cursors
  useEffect(() => sessionStorage.setItem("cemg-query", query), [query]);
  const cursor = pages[pages.length - 1];
  const address = `v1/items?${new URLSearchParams({ query, cursor, limit: PAGE })}`;
  const { value, error, busy } = useRead(() => call(address), [address]);
  return html`<section aria-labelledby="items-title">
    <h2 id="items-title">Items</h2>
    <form role="search" onSubmit=${(event) => event.preventDefault()}>
      <label for="query">Id or part of a title</label>
      <input id="query" type="search" autocomplete="off" spellcheck=${false} value=${query}
        onInput=${(event) => { setQuery(event.target.value.slice(0, 256)); setPages([""]); }}/>
    </form>
    <${Problem} error=${error}/>
    <p class="soft" role="status">${busy || !value ? "Searching …" : found(value, pages.length)}</p>
    ${value && html`<ul class="cards">${value.items.map((item) => html`<li key=${item.item_id}>
      <a class="card" href=${itemLink(item.item_id)}>
        <${Picture} id=${item.item_id} has=${item.image}/>
        <span><strong>${item.title || item.item_id}</strong><br/><span class="soft">${item.item_id}</span>
          ${item.state !== "active" && html` <${State} state=${item.state}/>`}</span>
      </a></li>`)}</ul>
    <div class="actions">
      <button type="button" class="quiet" disabled=${pages.length < 2} onClick=${() => setPages(pages.slice(0, -1))}>Previous</button>
      <button type="button" class="quiet" disabled=${!value.next} onClick=${() => setPages([...pages, value.next])}>Next</button>
    </div>`}
  </section>`;
}

function found(value, page) {
  const number = value.items.length;
  if (!number) return page > 1 ? "No more items." : "No item matches.";
  return `Page ${page}: ${count(number)} ${number === 1 ? "item" : "items"}`;
}

function State({ state }) {
  return html`<span class="state ${state}">${state}</span>`;
}

function Item({ id }) {
  const { value: item, error } = useRead(() => call(itemPath(id)), [id]);
  const heading = useRef();
  useEffect(() => { heading.current?.focus(); }, [item?.item_id]);
  if (error) return html`<${Problem} error=${error}/><p><a href="#/items">All items</a></p>`;
  if (!item) return html`<p class="soft" role="status">Reading …</p>`;
  const attributes = Object.entries(item.attributes);
  return html`<article class="item" aria-labelledby="item-title">
    <p><a href="#/items">All items</a></p>
    <div class="about">
      <${Picture} id=${id} has=${item.image} large/>
      <div>
        <h2 id="item-title" tabindex="-1" ref=${heading}>${item.title || item.item_id}</h2>
        <dl>
          <dt>Id</dt><dd><code>${item.item_id}</code></dd>
          <dt>State</dt><dd><${State} state=${item.state}/>${item.problem && html` ${item.problem}`}</dd>
          <dt>Semantic ID</dt><dd><${Codes} codes=${item.codes}/></dd>
          ${item.version > 0 && html`<dt>Changed in</dt><dd>version ${count(item.version)}</dd>`}
          ${attributes.map(([name, value]) => html`<dt>${name}</dt><dd>${Array.isArray(value) ? value.join(", ") : String(value)}</dd>`)}
        </dl>
        ${!attributes.length && html`<p class="soft">It has no attributes.</p>`}
      </div>
    </div>
    <h3>Text</h3>
    <p class="text">${item.text || html`<span class="soft">It has no text.</span>`}</p>
    <${Nearest} id=${id} placed=${item.codes !== null}/>
  </article>`;
}

function Nearest({ id, placed }) {
  const read = async () => {
    const { items } = placed ? await call(itemPath(id, `/similar?limit=${NEAREST}`)) : { items: [] };
    return Promise.all(items.map(async (one) => ({ ...one, image: (await briefly(one.item_id)).image })));
  };
  const { value, error } = useRead(read, [id, placed]);
  return html`<section aria-labelledby="nearest-title">
    <h3 id="nearest-title">Nearest items</h3>
    <p class="soft">By transitions and texts in the item memory, with shares of its scores.</p>
    <${Problem} error=${error}/>
    ${value && !value.length && html`<p>The memory connects it with no item.</p>`}
    ${value && html`<ul class="cards">${value.map((one) => html`<li key=${one.item_id}>
      <a class="card" href=${itemLink(one.item_id)}>
        <${Picture} id=${one.item_id} has=${one.image}/>
        <span><strong>${one.title || one.item_id}</strong><br/><span class="soft">${percent(one.share)}</span></span>
      </a></li>`)}</ul>`}
  </section>`;
}
