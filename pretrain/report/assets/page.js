"use strict";
// Draw the plots of the page from the JSON in #data. One choice of the horizontal axis and one zoom hold for all plots of training.
const data = JSON.parse(document.getElementById("data").textContent);
const AXES = { bytes: "bytes trained", step: "steps", seconds: "time since the start", flops: "FLOPs of training" };
const DASHES = [[], [7, 4], [2, 3], [10, 3, 2, 3], [4, 2], [1, 4]];
const PROMINENT = (event, number) => !["checkpoint", "finish"].includes(event.kind) && !(event.kind === "start" && number === 0);
let axis = "bytes", plots = [], zooming = true;

const style = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
const color = (number) => style(`--s${number % 6}`);

function scaled(value, units, base) {
  let unit = 0;
  while (Math.abs(value) >= base && unit < units.length - 1) { value /= base; unit += 1; }
  return `${+value.toPrecision(3)}${units[unit]}`;
}
function duration(seconds) {
  if (Math.abs(seconds) < 120) return `${+seconds.toPrecision(3)} s`;
  if (seconds < 7200) return `${+(seconds / 60).toPrecision(3)} min`;
  return seconds < 172800 ? `${+(seconds / 3600).toPrecision(3)} h` : `${+(seconds / 86400).toPrecision(3)} d`;
}
const FORMATS = {
  bits: (value) => value.toFixed(4),
  number: (value) => (value !== 0 && (Math.abs(value) < 1e-3 || Math.abs(value) >= 1e6) ? value.toExponential(2) : String(+value.toPrecision(4))),
  bytes: (value) => scaled(value, [" B", " kB", " MB", " GB", " TB", " PB"], 1000),
  rate: (value) => scaled(value, [" B/s", " kB/s", " MB/s", " GB/s", " TB/s"], 1000),
  share: (value) => `${+(100 * value).toPrecision(3)} %`,
  seconds: duration,
};
const AXIS_FORMATS = { bytes: FORMATS.bytes, step: (value) => value.toLocaleString("en"), seconds: duration, flops: FORMATS.number };
const shown = (format) => (_, value) => (value == null ? "–" : format(value));
const ticks = (format) => (_, values) => values.map((value) => (value == null ? "" : format(value)));

// Join series of different places into one table with shared places, as uPlot reads it.
const joined = (series) => (series.length ? uPlot.join(series.map(([places, values]) => [places, values])) : [[]]);

function lines(plot) {
  return plot.series.map((series, number) => {
    const table = series.x ? series : data.runs[series.run].tables[series.table];
    const several = data.runs.length > 1 && !series.x;
    return {
      label: series.label, places: series.x || table[axis], values: series.x ? series.y : table[series.column],
      stroke: color(several ? data.runs[series.run].group : number), dash: DASHES[(several ? series.order : 0) % DASHES.length],
    };
  });
}

function axes(horizontal, label, vertical, unit, size = 70) {
  const common = { stroke: style("--ink"), grid: { stroke: style("--rule"), width: 1 }, ticks: { stroke: style("--rule"), width: 1 } };
  return [
    { ...common, values: ticks(horizontal), label, labelSize: 22, space: 75 },
    { ...common, values: ticks(vertical === FORMATS.bits ? FORMATS.number : vertical), label: unit, labelSize: unit ? 22 : 0, size, ...(unit ? {} : { label: undefined }) },
  ];
}

// Draw a line at each event that changed the course of a run.
function drawEvents(u) {
  u.ctx.save();
  u.ctx.strokeStyle = style("--event");
  u.ctx.setLineDash([4, 4]);
  for (const run of data.runs) {
    run.events.filter(PROMINENT).forEach((event) => {
      const x = u.valToPos(event[axis], "x", true);
      if (x < u.bbox.left || x > u.bbox.left + u.bbox.width) return;
      u.ctx.beginPath();
      u.ctx.moveTo(x, u.bbox.top);
      u.ctx.lineTo(x, u.bbox.top + u.bbox.height);
      u.ctx.stroke();
    });
  }
  u.ctx.restore();
}

function zoomAll(range) {
  zooming = true;
  for (const plot of plots) if (plot.byAxis) plot.setScale("x", range);
  zooming = false;
}

// Follow the zoom of one plot with all others.
function followZoom(source, key) {
  if (key === "x" && !zooming) zoomAll({ min: source.scales.x.min, max: source.scales.x.max });
}

// Show every number and event of all runs.
function showAll() {
  const places = data.runs.flatMap((run) => [
    ...Object.values(run.tables).flatMap((table) => [table[axis][0], table[axis].at(-1)]), ...run.events.map((event) => event[axis])]);
  const [min, max] = [Math.min(...places), Math.max(...places)];
  if (max > min) zoomAll({ min: min - 0.005 * (max - min), max: max + 0.01 * (max - min) });
}

const CURSOR = { sync: { key: "places", scales: ["x", null] }, bind: { dblclick: () => () => { showAll(); return null; } } };

function linePlot(plot, place) {
  const series = lines(plot), byAxis = !plot.place;
  const horizontal = byAxis ? AXIS_FORMATS[axis] : FORMATS.number, vertical = FORMATS[plot.format];
  const u = new uPlot({
    width: place.clientWidth, height: 270,
    scales: { x: { time: false } },
    series: [
      { label: byAxis ? AXES[axis] : plot.place, value: shown(horizontal) },
      ...series.map((each) => ({
        label: each.label, stroke: each.stroke, dash: each.dash, width: 1.75, spanGaps: true, value: shown(vertical),
        points: { show: each.values.length < 60, size: 4 },
      })),
    ],
    axes: axes(horizontal, byAxis ? AXES[axis] : plot.place, vertical, plot.unit),
    cursor: byAxis ? CURSOR : {},
    hooks: byAxis ? { drawAxes: [drawEvents], setScale: [followZoom] } : {},
  }, joined(series.map((each) => [each.places, each.values])), place);
  u.byAxis = byAxis;
  return u;
}

// Draw the events of each run as points, one row for each kind. The text of the nearest one is below the plot.
function eventPlot(place, status) {
  const kinds = [...new Set(data.runs.flatMap((run) => run.events.map((event) => event.kind)))].reverse();
  const points = data.runs.map((run) => {
    const at = new Map();
    run.events.forEach((event) => {
      let x = event[axis];
      while (at.has(x)) x += 1e-6 * (1 + Math.abs(x)); // two events at one place stay apart
      at.set(x, event);
    });
    return [...at].sort((one, other) => one[0] - other[0]);
  });
  const apart = (number) => (number - (data.runs.length - 1) / 2) * Math.min(0.2, 0.6 / data.runs.length);
  const u = new uPlot({
    width: place.clientWidth, height: 90 + 26 * kinds.length,
    scales: { x: { time: false }, y: { range: [-0.5, kinds.length - 0.5] } },
    series: [
      { label: AXES[axis], value: shown(AXIS_FORMATS[axis]) },
      ...data.runs.map((run) => ({
        label: run.name, stroke: color(run.group), paths: () => null, points: { show: true, size: 9, fill: color(run.group) },
        value: shown((value) => kinds[Math.round(value)]),
      })),
    ],
    axes: axes(AXIS_FORMATS[axis], AXES[axis], (value) => kinds[value] || "", "", 100).map((each, number) =>
      number ? { ...each, splits: kinds.map((_, row) => row), values: () => kinds } : each),
    cursor: CURSOR,
    hooks: {
      setScale: [followZoom],
      setCursor: [(self) => {
        if (self.cursor.left < 0) return;
        const x = self.posToVal(self.cursor.left, "x");
        const nearest = points.flatMap((own, number) => own.map(([at, event]) => [Math.abs(at - x), number, event]))
          .reduce((best, each) => (best && best[0] <= each[0] ? best : each), null);
        if (nearest) status.textContent = `${data.runs[nearest[1]].name}, ${duration(nearest[2].seconds)}: ${nearest[2].kind} ${nearest[2].reason}`;
      }],
    },
  }, joined(points.map((own, number) => [own.map(([at]) => at), own.map(([, event]) => kinds.indexOf(event.kind) + apart(number))])), place);
  u.byAxis = true;
  return u;
}

function draw() {
  zooming = true;
  for (const u of plots) u.destroy();
  plots = [];
  for (const plot of data.plots) {
    const place = document.querySelector(`#${plot.id} .canvas`);
    plots.push(plot.id === "events-plot" ? eventPlot(place, document.querySelector(`#${plot.id} .status`)) : linePlot(plot, place));
  }
  showAll();
  zooming = false;
  document.documentElement.dataset.drawn = String(plots.length);
}

document.querySelectorAll("input[name=axis]").forEach((input) =>
  input.addEventListener("change", () => { axis = input.value; draw(); }));
document.getElementById("reset")?.addEventListener("click", showAll);
for (const query of ["(prefers-color-scheme: dark)", "print"]) matchMedia(query).addEventListener("change", draw);
let width = 0;
new ResizeObserver(() => {
  if (document.body.clientWidth !== width) { width = document.body.clientWidth; draw(); }
}).observe(document.body);
