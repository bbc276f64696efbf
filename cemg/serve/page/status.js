// The state of the service, read again every few seconds.
import { call } from "./api.js";
import { Problem, count, html, useEffect, useRef, useState } from "./ui.js";

const EVERY = 3000; // milliseconds
const HEIGHT = 200; // pixels of a chart
const COLOURS = ["--accent", "--second", "--third"];

export function Status() {
  const [state, setState] = useState({});
  useEffect(() => {
    let timer, ended = false;
    const read = async () => {
      try {
        if (!document.hidden) {
          const value = await call("v1/status");
          setState({ value });
        }
      } catch (error) {
        setState((before) => ({ ...before, error }));
        if (error.status === 401) ended = true;
      }
      if (!ended) timer = setTimeout(read, EVERY);
    };
    read();
    return () => { ended = true; clearTimeout(timer); };
  }, []);
  const { value, error } = state;
  return html`<section aria-labelledby="status-title">
    <h2 id="status-title">Status</h2>
    <${Problem} error=${error}/>
    ${!value && !error && html`<p class="soft" role="status">Reading …</p>`}
    ${value && html`<${Figures} value=${value} lost=${Boolean(error)}/><${Charts} value=${value}/>`}
  </section>`;
}

function Figures({ value, lost }) {
  const { recent } = value;
  const figures = [
    ["Live", lost ? "no answer" : value.state === "draining" ? "shutting down" : "yes"],
    ["Ready", !lost && value.state === "ready" ? "yes" : "no"],
    ["Up for", duration(value.uptime_seconds)],
    ["CEMG", value.version],
    ["Model", value.model_version],
    ["Catalog version", count(value.catalog_version)],
    ["Items", count(value.items)],
    ["Pending items", count(value.pending)],
    ["Removed items", count(value.removed)],
    ["Stored events", count(value.events)],
    ["Users with events", count(value.users)],
    ["Waiting requests", count(value.waiting)],
    ["Searches", `${count(value.searches)} for ${count(value.searched_requests)} requests`],
    ["Late, cancelled", `${count(value.late_requests)}, ${count(value.cancelled_requests)}`],
    ["Requests, 5 minutes", `${count(recent.requests)}, ${count(recent.errors)} failed`],
    ["p50 / p95 / p99", recent.p50_ms === null ? "no recommendation yet" : [recent.p50_ms, recent.p95_ms, recent.p99_ms].map(ms).join(" / ")],
  ];
  return html`<dl class="figures">${figures.map(([name, text]) => html`<div><dt>${name}</dt><dd>${text}</dd></div>`)}</dl>`;
}

function ms(value) {
  return `${value.toFixed(value < 10 ? 1 : 0)} ms`;
}

function duration(seconds) {
  const minutes = Math.floor(seconds / 60), hours = Math.floor(minutes / 60), days = Math.floor(hours / 24);
  if (days) return `${days} d ${hours % 24} h`;
  if (hours) return `${hours} h ${minutes % 60} min`;
  return minutes ? `${minutes} min ${Math.floor(seconds % 60)} s` : `${Math.floor(seconds)} s`;
}

function Charts({ value }) {
  const points = value.points.slice(0, -1); // the last one is not over yet
  const times = points.map((point) => point.time);
  const rate = (name) => points.map((point) => point[name] / value.interval_seconds);
  return html`
    <${Chart} title="Latency of recommendations" unit="ms" names=${["p50", "p95", "p99"]}
      data=${[times, ...["p50_ms", "p95_ms", "p99_ms"].map((name) => points.map((point) => point[name]))]}/>
    <${Chart} title="Requests per second" unit="/s" names=${["all", "failed"]} data=${[times, rate("requests"), rate("errors")]}/>`;
}

function useDark() {
  const query = matchMedia("(prefers-color-scheme: dark)");
  const [dark, setDark] = useState(query.matches);
  useEffect(() => {
    const changed = () => setDark(query.matches);
    query.addEventListener("change", changed);
    return () => query.removeEventListener("change", changed);
  }, []);
  return dark;
}

function Chart({ title, unit, names, data }) {
  const holder = useRef(), chart = useRef(null), dark = useDark();
  useEffect(() => {
    const box = holder.current, width = () => Math.max(box.clientWidth, 100);
    const style = getComputedStyle(document.documentElement);
    const colour = (name) => style.getPropertyValue(name).trim();
    const axis = { stroke: colour("--soft"), grid: { stroke: colour("--line"), width: 1 }, ticks: { stroke: colour("--line"), width: 1 } };
    const made = chart.current = new uPlot({
      width: width(), height: HEIGHT, legend: { show: false },
      cursor: { show: false },
      scales: { y: { range: (_, low, high) => [0, Math.max(high ?? 0, 1e-3) * 1.1] } },
      axes: [{ ...axis, space: 70, values: [[1, "{HH}:{mm}:{ss}"]] }, { ...axis, size: 56 }],
      series: [{}, ...names.map((name, place) => ({
        label: name, stroke: colour(COLOURS[place]), width: 2, points: { show: true, size: 5 }, dash: place ? [6, 3 * place] : undefined,
      }))],
    }, data, box);
    const resized = new ResizeObserver(() => made.setSize({ width: width(), height: HEIGHT }));
    resized.observe(box);
    return () => { resized.disconnect(); made.destroy(); chart.current = null; };
  }, [dark]);
  useEffect(() => { chart.current?.setData(data); }, [data]);
  return html`<figure>
    <figcaption><strong>${title}</strong> <span class="soft">${unit}</span>
      <span class="legend">${names.map((name, place) => html`<span class="series-${place}">${name}</span>`)}</span></figcaption>
    <div class="chart" ref=${holder} role="img" aria-label=${summary(title, unit, names, data)}></div>
  </figure>`;
}

/** What a chart shows, in words: the last value of each line. */
function summary(title, unit, names, data) {
  const last = names.map((name, place) => {
    const known = data[place + 1].filter((value) => value !== null);
    return `${name} ${known.length ? `${known[known.length - 1].toPrecision(2)} ${unit}` : "none"}`;
  });
  return `${title} over the last minutes. Latest: ${last.join(", ")}.`;
}
