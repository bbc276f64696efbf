// The endpoints with their parameters and JSON, from openapi.json, and a form to call each.
import { call, send } from "./api.js";
import { Problem, html, useEffect, useRead, useState } from "./ui.js";

const METHODS = ["get", "post", "put", "patch", "delete"];

export function Reference({ id }) {
  const { value: api, error } = useRead(() => call("openapi.json"), []);
  useEffect(() => {
    const place = api && id && document.getElementById(`schema-${id}`);
    if (!place) return;
    place.open = true;
    place.scrollIntoView();
  }, [api, id]);
  if (error) return html`<${Problem} error=${error}/>`;
  if (!api) return html`<p class="soft" role="status">Reading …</p>`;
  const all = Object.entries(api.paths).flatMap(([path, methods]) => METHODS.filter((name) => methods[name])
    .map((method) => ({ path, method, about: methods[method] })));
  const tags = [...new Set(all.map((one) => one.about.tags[0]))];
  const schemas = api.components.schemas;
  return html`<section aria-labelledby="api-title">
    <h2 id="api-title">API</h2>
    <p>${api.info.description} For programs: <a href="openapi.json">openapi.json</a>.
      Errors are documents of the type <code>application/problem+json</code>.</p>
    ${tags.map((tag) => html`<h3>${tag}</h3>
      ${all.filter((one) => one.about.tags[0] === tag).map((one) => html`<details class="endpoint" key=${one.method + one.path}>
        <summary><code>${one.method.toUpperCase()} ${one.path}</code> <span class="soft">${one.about.description}</span></summary>
        <${Endpoint} ...${one} schemas=${schemas}/>
      </details>`)}`)}
    <h3>JSON</h3>
    ${Object.entries(schemas).map(([name, schema]) => html`<details class="endpoint" id="schema-${name}" key=${name}>
      <summary><code>${name}</code> <span class="soft">${schema.description}</span></summary>
      <${Fields} schema=${schema}/>
    </details>`)}
  </section>`;
}

function Endpoint({ path, method, about, schemas }) {
  const parameters = about.parameters ?? [];
  const schema = about.requestBody?.content["application/json"].schema;
  const [values, setValues] = useState({});
  const [body, setBody] = useState(() => (schema ? JSON.stringify(example(schema, schemas), null, 1) : null));
  const [answer, setAnswer] = useState(null);
  const [error, setError] = useState(null);
  const address = filled(path, parameters, values);
  const run = async (event) => {
    event.preventDefault();
    setError(null);
    try {
      const options = schema ? { body, headers: { "Content-Type": "application/json" } } : {};
      setAnswer(await shown(await send(address, { method: method.toUpperCase(), ...options })));
    } catch (problem) {
      setError(problem);
    }
  };
  const answers = about.responses["200"]?.content?.["application/json"]?.schema;
  return html`<form onSubmit=${run}>
    ${parameters.map((one) => html`<label key=${one.name}>${one.name} <span class="soft">${one.in === "path" ? "required. " : ""}
      ${one.schema.default !== undefined && one.schema.default !== "" && `default ${one.schema.default}. `}${one.description}</span>
      <input required=${one.in === "path"} value=${values[one.name] ?? ""}
        onInput=${(event) => setValues({ ...values, [one.name]: event.target.value })}/></label>`)}
    ${schema && html`<label>Body: <${Type} schema=${schema}/>
      <textarea rows=${Math.min(body.split("\n").length + 1, 20)} spellcheck=${false} value=${body}
        onInput=${(event) => setBody(event.target.value)}/></label>`}
    ${answers && html`<p>Answer: <${Type} schema=${answers}/></p>`}
    <pre>${curl(method, address, schema && body)}</pre>
    <div class="actions"><button type="submit">Send</button></div>
    <${Problem} error=${error}/>
    ${answer && html`<div role="status"><p class="soft">Status ${answer.status}, ${answer.type}</p><pre>${answer.text}</pre></div>`}
  </form>`;
}

async function shown(answer) {
  const type = (answer.headers.get("content-type") ?? "").split(";")[0];
  if (type.startsWith("image/")) return { status: answer.status, type, text: `${(await answer.blob()).size} bytes` };
  const text = await answer.text();
  return { status: answer.status, type, text: type.endsWith("json") ? JSON.stringify(JSON.parse(text), null, 1) : text };
}

function filled(path, parameters, values) {
  const query = new URLSearchParams();
  for (const { name, in: place } of parameters) {
    if (place === "path") path = path.replace(`{${name}}`, encodeURIComponent(values[name] ?? "") || `{${name}}`);
    else if (values[name]) query.set(name, values[name]);
  }
  return path.slice(1) + (query.size ? `?${query}` : "");
}

function curl(method, address, body) {
  const words = ["curl", "-s", ...(method === "get" || (method === "post" && body) ? [] : ["-X", method.toUpperCase()])];
  const key = sessionStorage.getItem("cemg-key") ? ["-H 'X-API-Key: …'"] : [];
  const content = body ? ["-H 'content-type: application/json'", `-d '${body.replace(/\s*\n\s*/g, " ").replaceAll("'", "'\\''")}'`] : [];
  return [...words, `'${location.origin}/${address}'`, ...key, ...content].join(" ");
}

/** A value that the schema admits. */
function example(schema, schemas) {
  if (schema.$ref) return example(schemas[schema.$ref.split("/").pop()], schemas);
  if (schema.examples) return schema.examples[0];
  const choice = (schema.oneOf ?? schema.anyOf)?.find((one) => one.type !== "null");
  if (choice) return example(choice, schemas);
  if (schema.type === "array") return [example(schema.items, schemas)];
  if (schema.type !== "object") return schema.default ?? { string: "text", boolean: false }[schema.type] ?? 1;
  const named = Object.entries(schema.properties ?? {}).filter(([name, one]) => schema.required?.includes(name) || one.examples);
  return Object.fromEntries(named.map(([name, one]) => [name, example(one, schemas)]));
}

function Fields({ schema }) {
  const fields = Object.entries(schema.properties ?? {});
  if (!fields.length) return html`<p><${Type} schema=${schema}/></p>`;
  return html`<dl>${fields.map(([name, one]) => html`<dt><code>${name}</code></dt>
    <dd><${Type} schema=${one}/>${schema.required?.includes(name) ? ", required" : ""}${one.default !== undefined && one.default !== null
      && `, default ${JSON.stringify(one.default)}`}${one.description && `. ${one.description}`}</dd>`)}</dl>`;
}

function Type({ schema }) {
  const choices = schema.oneOf ?? schema.anyOf;
  if (schema.$ref) {
    const name = schema.$ref.split("/").pop();
    return html`<a href="#/api/${name}">${name}</a>`;
  }
  if (choices) return choices.map((one, place) => html`${place ? " or " : ""}<${Type} schema=${one}/>`);
  if (schema.type === "array") return html`list of <${Type} schema=${schema.items}/>`;
  if (schema.additionalProperties) return html`object of <${Type} schema=${schema.additionalProperties}/>`;
  return schema.enum?.join(" or ") ?? schema.const ?? schema.type ?? "any";
}
