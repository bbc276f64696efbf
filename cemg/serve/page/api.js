// Calls of the service. The API key is kept for this tab only.
const KEY = "cemg-key";
const KEPT = 500; // items and pictures in memory

let askForKey = null; // (message) => Promise of a key, or of null; set by the page
let asking = null; // one question at a time, also if many calls are refused

export function onMissingKey(ask) {
  askForKey = ask;
}

export class CallError extends Error {
  constructor(status, message, fix) {
    super(message);
    this.status = status;
    this.fix = fix;
  }
}

function keyOnce(used, message) {
  const known = sessionStorage.getItem(KEY);
  if (known && known !== used) return Promise.resolve(known); // another call has asked meanwhile
  sessionStorage.removeItem(KEY);
  asking ??= askForKey(message).finally(() => { asking = null; });
  return asking.then((key) => {
    if (key) sessionStorage.setItem(KEY, key);
    return key;
  });
}

export async function send(path, options) {
  for (;;) {
    const key = sessionStorage.getItem(KEY);
    const headers = { ...options.headers, ...(key ? { "X-API-Key": key } : {}) };
    let answer;
    try {
      answer = await fetch(path, { ...options, headers });
    } catch (error) {
      if (error.name === "AbortError") throw error;
      throw new CallError(0, "the service cannot be reached");
    }
    if (answer.status !== 401) return answer;
    const given = await keyOnce(key, key ? "The API key is not known." : "");
    if (!given) throw new CallError(401, "an API key is needed");
  }
}

export async function call(path, { body, signal } = {}) {
  const options = body === undefined ? { signal } : {
    method: "POST", body: JSON.stringify(body), signal, headers: { "Content-Type": "application/json" },
  };
  const answer = await send(path, options);
  const content = await answer.json().catch(() => ({}));
  if (!answer.ok) throw new CallError(answer.status, content.detail ?? `status ${answer.status}`, content.fix);
  return content;
}

export function itemPath(id, part = "") {
  return `v1/items/${encodeURIComponent(id)}${part}`;
}

function remembered(read, drop = () => {}) {
  const known = new Map();
  return (id) => {
    if (!known.has(id)) {
      const found = read(id);
      found.catch(() => known.delete(id));
      known.set(id, found);
      if (known.size > KEPT) {
        const [oldest, value] = known.entries().next().value;
        known.delete(oldest);
        value.then(drop, () => {});
      }
    }
    return known.get(id);
  };
}

/** An item as it was when it was first read; for titles in lists. */
export const briefly = remembered((id) => call(itemPath(id)));

/** The address of a picture in this tab. */
export const picture = remembered(async (id) => {
  const answer = await send(itemPath(id, "/image"), {});
  if (!answer.ok) throw new CallError(answer.status, "no picture");
  return URL.createObjectURL(await answer.blob());
}, (url) => URL.revokeObjectURL(url));
