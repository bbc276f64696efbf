// The library and the small parts that all views use.
import { h, render, Component } from "./vendor/preact-11.2.0/preact.mjs";
import { useCallback, useEffect, useMemo, useRef, useState } from "./vendor/preact-11.2.0/hooks.mjs";
import htm from "./vendor/htm-3.1.1/htm.mjs";
import { picture } from "./api.js";

export const html = htm.bind(h);
export { Component, render, useCallback, useEffect, useMemo, useRef, useState };

export const itemLink = (id) => `#/items/${encodeURIComponent(id)}`;

export function percent(share) {
  return `${(100 * share).toFixed(share < 0.1 ? 1 : 0)} %`;
}

export function count(number) {
  return number.toLocaleString("en");
}

/** The result of an asynchronous read, again whenever one of `inputs` changes: {value, error, busy}. */
export function useRead(read, inputs) {
  const [state, set] = useState({ busy: true });
  useEffect(() => {
    let current = true;
    set((before) => ({ ...before, busy: true }));
    read().then(
      (value) => current && set({ value, busy: false }),
      (error) => current && set({ error, busy: false }),
    );
    return () => { current = false; };
  }, inputs);
  return state;
}

export function Problem({ error }) {
  if (!error) return null;
  return html`<div class="problem" role="alert">
    <strong>${error.message}</strong>${error.fix && html`<div>${error.fix}</div>`}
  </div>`;
}

/** The picture of an item. Its alternative text is empty, because the title stands beside it. */
export function Picture({ id, has, large }) {
  const [url, set] = useState(null);
  useEffect(() => {
    let current = true;
    set(null);
    if (has) picture(id).then((found) => current && set(found), () => {});
    return () => { current = false; };
  }, [id, has]);
  const name = large ? "picture large" : "picture";
  return url ? html`<img class=${name} src=${url} alt=""/>` : html`<span class="${name} none" aria-hidden="true"></span>`;
}

export function Codes({ codes }) {
  if (!codes) return html`<span class="soft">none yet</span>`;
  return html`<code class="codes">${codes.join(" · ")}</code>`;
}
