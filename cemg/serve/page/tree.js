// The recommended items as a tree of codes: each level of the semantic ID is a level of the tree.
import { html, itemLink, percent } from "./ui.js";

function grow(items) {
  const root = { children: new Map(), mass: 0, items: 0 };
  for (const item of items) {
    const mass = Math.exp(item.score);
    let node = root;
    for (const code of item.codes) {
      if (!node.children.has(code)) node.children.set(code, { children: new Map(), mass: 0, items: 0, leaves: [] });
      node = node.children.get(code);
      node.mass += mass;
      node.items += 1;
    }
    node.leaves?.push(item);
  }
  return root;
}

function Branch({ code, node, level, levels, most }) {
  const line = html`<code>${code}</code> <span class="soft">${percent(node.mass)}</span>
    <progress class="mass" max=${most} value=${node.mass} aria-hidden="true"></progress>`;
  if (level === levels) {
    return html`<li class="leaf">${line} ${node.leaves.map((item) => html`<a href=${itemLink(item.item_id)}>${item.title || item.item_id}</a> `)}</li>`;
  }
  return html`<li><details open>
    <summary>${line} <span class="soft">${node.items === 1 ? "1 item" : `${node.items} items`}</span></summary>
    <${Branches} node=${node} level=${level + 1} levels=${levels} most=${most}/>
  </details></li>`;
}

function Branches({ node, level, levels, most }) {
  const children = [...node.children].sort(([, a], [, b]) => b.mass - a.mass);
  return html`<ul>${children.map(([code, child]) => html`<${Branch} key=${code} code=${code} node=${child} level=${level} levels=${levels} most=${most}/>`)}</ul>`;
}

export function Tree({ items }) {
  if (!items.length) return null;
  const levels = items[0].codes.length, root = grow(items);
  const most = Math.max(...[...root.children.values()].map((node) => node.mass)); // the length of a full bar
  return html`<section aria-labelledby="tree-title">
    <h3 id="tree-title">The beam as a tree of codes</h3>
    <p class="soft">Each level is a code of the semantic ID. A percentage is the probability of the listed items below it.</p>
    <div class="tree"><${Branches} node=${root} level=${1} levels=${levels} most=${most}/></div>
  </section>`;
}
