// The page: navigation, the view, and the question for an API key.
import { onMissingKey } from "./api.js";
import { Items } from "./items.js";
import { Recommend } from "./recommend.js";
import { Reference } from "./reference.js";
import { Status } from "./status.js";
import { html, render, useEffect, useRef, useState } from "./ui.js";

const VIEWS = { recommend: "Recommend", items: "Items", status: "Status", api: "API" };

function place() {
  const [name, ...rest] = location.hash.replace(/^#\//, "").split("/");
  let id = null;
  try {
    id = rest.length ? decodeURIComponent(rest.join("/")) : null;
  } catch { /* not an address that the page made */ }
  return { name: name in VIEWS ? name : "recommend", id };
}

function KeyDialog() {
  const dialog = useRef(), settle = useRef(() => {});
  const [message, setMessage] = useState("");
  const [key, setKey] = useState("");
  useEffect(() => {
    onMissingKey((text) => new Promise((resolve) => {
      settle.current = resolve;
      setMessage(text);
      setKey("");
      dialog.current.showModal();
    }));
  }, []);
  const done = (value) => {
    dialog.current.close();
    setKey("");
    settle.current(value);
  };
  return html`<dialog ref=${dialog} aria-labelledby="key-title" onCancel=${() => done(null)}>
    <form onSubmit=${(event) => { event.preventDefault(); if (key.trim()) done(key.trim()); }}>
      <h2 id="key-title">API key</h2>
      ${message && html`<p class="problem" role="alert">${message}</p>`}
      <label for="key">This service needs an API key. It is kept until this tab is closed.</label>
      <input id="key" type="password" autocomplete="off" value=${key} onInput=${(event) => setKey(event.target.value)}/>
      <div class="actions">
        <button type="submit">Use key</button>
        <button type="button" class="quiet" onClick=${() => done(null)}>Cancel</button>
      </div>
    </form>
  </dialog>`;
}

function App() {
  const [here, setHere] = useState(place());
  useEffect(() => {
    const moved = () => setHere(place());
    addEventListener("hashchange", moved);
    return () => removeEventListener("hashchange", moved);
  }, []);
  const link = ([name, title]) => html`<a href="#/${name}" aria-current=${here.name === name ? "page" : null}>${title}</a>`;
  // The form and its result stay while another view is open.
  return html`
    <a class="skip" href="#main" onClick=${(event) => { event.preventDefault(); document.getElementById("main").focus(); }}>Skip to the content</a>
    <header>
      <h1><img src="page/icon.svg" alt="" width="28" height="28"/>CEMG</h1>
      <nav aria-label="Views">${Object.entries(VIEWS).map(link)}</nav>
    </header>
    <main id="main" tabindex="-1">
      <div hidden=${here.name !== "recommend"}><${Recommend}/></div>
      ${here.name === "items" && html`<${Items} id=${here.id}/>`}
      ${here.name === "status" && html`<${Status}/>`}
      ${here.name === "api" && html`<${Reference} id=${here.id}/>`}
    </main>
    <${KeyDialog}/>`;
}

const root = document.getElementById("app");
root.replaceChildren();
render(html`<${App}/>`, root);
