"use strict";
// The page: canvas, side panel, pointer and keyboard. The data of a mask comes from the functions of data.js.
const data = JSON.parse(document.getElementById("data").textContent);
const masks = data.masks.map(decodeMask);
const byId = id => document.getElementById(id);
const canvas = byId("canvas"), context = canvas.getContext("2d");
const LEFT = 62, TOP = 40;          // space for the axes, CSS pixels
const LARGEST_TOKEN = 48;           // maximum zoom, CSS pixels per token
const MOST_BLOCKS = 2048;           // per side; smaller blocks would be finer than the screen
const number = value => value.toLocaleString("en-US");
const percent = value => (100 * value).toFixed(value > 0 && value < 0.1 ? 2 : 1) + " %";

let mask = masks[0];
let view = null;                    // { key, query: token at the upper left corner; wide, tall: CSS pixels per token; fitted: whether unzoomed }
let pointer = null;                 // { key, query } under the pointer
let pinned = null;                  // the query pinned by a click or the keyboard
let blocks = null;                  // blockStates of the current mask and block size
let base = null;                    // the rendered mask, until view, mask or colors change
let waiting = false;

const plot = () => ({ width: Math.max(1, canvas.clientWidth - LEFT - 10), height: Math.max(1, canvas.clientHeight - TOP - 10) });
const style = name => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
const rgb = name => [1, 3, 5].map(index => parseInt(style(name).slice(index, index + 2), 16));
const toX = key => LEFT + (key - view.key) * view.wide;
const toY = query => TOP + (query - view.query) * view.tall;
const current = () => pinned ?? pointer?.query ?? null;

function fit() {
  const { width, height } = plot();
  let wide = width / mask.keys, tall = height / mask.queries;
  if (Math.max(wide / tall, tall / wide) < 5) wide = tall = Math.min(wide, tall);  // square tokens if possible
  return { key: 0, query: 0, wide, tall, fitted: true };
}

function keepInView() {
  const { width, height } = plot();
  const keep = (first, shown, length) => Math.max(0, Math.min(first, length - shown));
  view.key = keep(view.key, width / view.wide, mask.keys);
  view.query = keep(view.query, height / view.tall, mask.queries);
}

function zoom(factor, x, y) {
  const fitted = fit(), key = view.key + (x - LEFT) / view.wide, query = view.query + (y - TOP) / view.tall;
  const limit = (now, least) => Math.min(Math.max(now * factor, least), Math.max(least, LARGEST_TOKEN));
  view.wide = limit(view.wide, fitted.wide);
  view.tall = limit(view.tall, fitted.tall);
  view.key = key - (x - LEFT) / view.wide;
  view.query = query - (y - TOP) / view.tall;
  view.fitted = false;
  moved();
}

function zoomMiddle(factor) {
  const { width, height } = plot();
  zoom(factor, LEFT + width / 2, TOP + height / 2);
}

function moved() { keepInView(); base = null; redraw(); }
function redraw() { if (!waiting) { waiting = true; requestAnimationFrame(() => { waiting = false; draw(); }); } }

// Render the displayed part of the mask from its intervals: one cell per pixel or, zoomed in, one cell per token.
function renderMask(ratio) {
  const { width, height } = plot(), side = (size, first, length) => {
    const cell = Math.max(1, 1 / (size * ratio));
    const start = Math.max(0, cell > 1 ? first : Math.floor(first));
    return { cell, start, end: length };
  };
  const x = side(view.wide, view.key, Math.min(mask.keys, view.key + width / view.wide));
  const y = side(view.tall, view.query, Math.min(mask.queries, view.query + height / view.tall));
  const columns = Math.max(1, Math.ceil((x.end - x.start) / x.cell)), lines = Math.max(1, Math.ceil((y.end - y.start) / y.cell));
  const { pairs, queriesOfLine } = pairsInCells(mask, y.start, x.start, y.cell, x.cell, lines, columns);
  const picture = new OffscreenCanvas(columns, lines), pen = picture.getContext("2d"), image = pen.createImageData(columns, lines);
  const [red, green, blue] = rgb("--ink"), darkest = byId("overlay").checked ? 90 : 255;  // pale below the block colors
  for (let line = 0, index = 0; line < lines; line++)
    for (let column = 0; column < columns; column++, index++) {
      const share = Math.min(1, pairs[index] / (queriesOfLine[line] * x.cell || 1));
      image.data.set([red, green, blue, share < 1e-6 ? 0 : darkest * (0.16 + 0.84 * share)], 4 * index);
    }
  pen.putImageData(image, 0, 0);
  return { picture, key: x.start, query: y.start, keys: columns * x.cell, queries: lines * y.cell };
}

function draw() {
  const ratio = window.devicePixelRatio || 1, { width, height } = plot();
  canvas.width = Math.round(canvas.clientWidth * ratio);
  canvas.height = Math.round(canvas.clientHeight * ratio);
  context.setTransform(ratio, 0, 0, ratio, 0, 0);
  context.imageSmoothingEnabled = false;
  base ??= renderMask(ratio);
  context.save();
  context.beginPath();
  context.rect(LEFT, TOP, width, height);
  context.clip();
  context.beginPath();
  context.rect(toX(0), toY(0), mask.keys * view.wide, mask.queries * view.tall);
  context.clip();
  context.fillStyle = style("--paper");
  context.fillRect(LEFT, TOP, width, height);
  context.drawImage(base.picture, toX(base.key), toY(base.query), base.keys * view.wide, base.queries * view.tall);
  if (byId("overlay").checked) drawBlocks();
  drawQuery();
  drawLines();
  context.restore();
  context.strokeStyle = style("--segment");
  context.strokeRect(Math.max(LEFT, toX(0)) - 0.5, Math.max(TOP, toY(0)) - 0.5,
    Math.min(width, mask.keys * view.wide) + 1, Math.min(height, mask.queries * view.tall) + 1);
  drawAxes();
}

function drawBlocks() {
  const size = Number(byId("size").value);
  blocks ??= blockStates(mask, size);
  if (!blocks.picture) {
    blocks.picture = new OffscreenCanvas(blocks.columns, blocks.lines);
    const pen = blocks.picture.getContext("2d"), image = pen.createImageData(blocks.columns, blocks.lines);
    const colors = [[...rgb("--empty"), 0], [...rgb("--partial"), 130], [...rgb("--full"), 150]];
    blocks.states.forEach((state, index) => image.data.set(colors[state], 4 * index));
    pen.putImageData(image, 0, 0);
  }
  context.drawImage(blocks.picture, toX(0), toY(0), blocks.columns * size * view.wide, blocks.lines * size * view.tall);
  context.globalAlpha = 0.4;
  if (size * Math.min(view.wide, view.tall) >= 8) drawGrid(size, style("--segment"));
  context.globalAlpha = 1;
}

function drawGrid(step, color) {
  const { width, height } = plot();
  context.strokeStyle = color;
  context.lineWidth = 1;
  context.beginPath();
  for (let key = Math.ceil(view.key / step) * step; toX(key) <= LEFT + width; key += step) line(toX(key), TOP, toX(key), TOP + height);
  for (let query = Math.ceil(view.query / step) * step; toY(query) <= TOP + height; query += step) line(LEFT, toY(query), LEFT + width, toY(query));
  context.stroke();
}

function line(x1, y1, x2, y2) {
  const sharp = value => Math.round(value) - 0.5;
  context.moveTo(sharp(x1), sharp(y1));
  context.lineTo(sharp(x2), sharp(y2));
}

// Draw a grid of tokens if they are large enough, and a frame around each independent segment.
function drawLines() {
  const { width } = plot();
  if (Math.min(view.wide, view.tall) >= 8) drawGrid(1, style("--line"));
  if (!mask.boundaries.length) return;
  const bounds = [0, ...mask.boundaries, mask.keys];
  const framed = [...mask.boundaries, mask.keys].map((stop, number) => ({ start: bounds[number], stop }))
    .filter(({ start, stop }) => toX(stop) >= LEFT && toX(start) <= LEFT + width);
  if (framed.length > width / 6) return;
  context.strokeStyle = style("--segment");
  context.lineWidth = 1;
  context.setLineDash([4, 3]);
  for (const { start, stop } of framed) {
    const x = Math.round(toX(start)) - 0.5, y = Math.round(toY(start)) - 0.5;
    context.strokeRect(x, y, Math.round(toX(stop)) - 0.5 - x, Math.round(toY(stop)) - 0.5 - y);
  }
  context.setLineDash([]);
}

function drawQuery() {
  const query = current(), { width, height } = plot();
  if (query === null) return;
  const tall = Math.max(view.tall, 2), y = toY(query + 0.5) - tall / 2;
  context.globalAlpha = 0.8;
  context.fillStyle = style("--band");
  context.fillRect(LEFT, y, width, tall);
  context.globalAlpha = 1;
  context.fillStyle = style("--current");
  for (const [start, stop] of keysOf(mask, query))
    context.fillRect(toX(start), y, Math.max(1.5, (stop - start) * view.wide), tall);
  if (!pointer) return;
  context.globalAlpha = 0.5;
  context.fillRect(toX(pointer.key + 0.5) - 0.5, TOP, 1, height);
  context.globalAlpha = 1;
}

function drawAxes() {
  const { width, height } = plot(), query = current();
  context.font = "11px system-ui, 'DejaVu Sans', sans-serif";
  context.fillStyle = style("--soft");
  const step = room => { let tokens = 1; while (tokens < room) tokens *= 2; return tokens; };
  const middle = size => size >= 14 ? 0.5 : 0;  // the numbers of large tokens are at their centers
  context.textAlign = "center";
  const keyStep = step((7 * String(mask.keys).length + 14) / view.wide);
  for (let key = Math.max(0, Math.ceil(view.key / keyStep) * keyStep); key < mask.keys; key += keyStep) {
    const x = toX(key + middle(view.wide));
    if (x > LEFT + width - 4 * String(key).length + 8) break;
    if (x >= LEFT - 1) { context.fillText(key, x, TOP - 9); context.fillRect(x - 0.5, TOP - 6, 1, 4); }
  }
  context.textAlign = "right";
  const queryStep = step(26 / view.tall);
  for (let tick = Math.max(0, Math.ceil(view.query / queryStep) * queryStep); tick < mask.queries; tick += queryStep) {
    const y = toY(tick + middle(view.tall));
    if (y > TOP + height) break;
    if (y >= TOP - 1) { context.fillText(tick, LEFT - 10, y + 4); context.fillRect(LEFT - 6, y - 0.5, 4, 1); }
  }
  context.textAlign = "left";
  context.fillText("key \u2192", Math.max(LEFT, toX(0)), 14);
  context.fillText("query \u2193", 8, 14);
  if (query === null) return;
  context.fillStyle = style("--current");
  for (const [start, stop] of keysOf(mask, query)) {
    const from = Math.max(LEFT, toX(start)), to = Math.min(LEFT + width, toX(stop));
    if (to >= from) context.fillRect(from, TOP - 4, Math.max(1.5, to - from), 3);
  }
  const y = toY(query + 0.5);
  if (y >= TOP && y <= TOP + height) context.fillRect(LEFT - 4, y - Math.max(view.tall, 3) / 2, 3, Math.max(view.tall, 3));
}

function fill(table, rows) {
  table.replaceChildren(...rows.map(([label, value, color]) => {
    const row = document.createElement("tr"), left = row.insertCell(), right = row.insertCell();
    left.textContent = label;
    right.textContent = value;
    if (color) {
      const swatch = document.createElement("span");
      swatch.className = "swatch";
      swatch.style.background = `var(${color})`;
      left.prepend(swatch);
    }
    return row;
  }));
}

function showQuery() {
  const query = current();
  if (document.activeElement !== byId("query")) byId("query").value = query ?? "";
  if (query === null) { byId("current").textContent = "Point at a query."; byId("keys").replaceChildren(); return; }
  const intervals = keysOf(mask, query), keys = countKeys(intervals), segment = segmentOf(mask, query);
  const rows = [["query", number(query) + (pinned === null ? "" : " (pinned)")]];
  if (segment && mask.boundaries.length) rows.push([`segment ${number(segment.number)}`, `${number(segment.start)} to ${number(segment.stop - 1)}`]);
  rows.push(["attends to", keys ? `${number(keys)} keys` : "no key (fully masked): output is zero"]);
  if (pointer) rows.push([`key ${number(pointer.key)}`, intervals.some(([a, b]) => a <= pointer.key && pointer.key < b) ? "visible" : "not visible"]);
  const summary = document.createElement("table"), list = document.createElement("table");
  fill(summary, rows);
  fill(list, intervals.slice(0, 200).map(([start, stop]) => [`[${start}, ${stop})`, number(stop - start)]));
  if (intervals.length > 200) list.insertRow().insertCell().textContent = `and ${number(intervals.length - 200)} more`;
  byId("current").replaceChildren(summary);
  byId("keys").replaceChildren(list);
}

function showMask() {
  const pairs = countPairs(mask), square = mask.queries === mask.keys;
  const rows = square ? [["tokens (S)", number(mask.keys)]] : [["queries (Q)", number(mask.queries)], ["keys (T)", number(mask.keys)]];
  rows.push(["intervals per query (K)", mask.start.length], ["visible pairs", number(pairs)]);
  if (square) rows.push(["share of causal", percent(pairs / (mask.keys * (mask.keys + 1) / 2))]);
  rows.push(["sparsity", percent(1 - pairs / (mask.queries * mask.keys))]);
  if (square) rows.push(["independent segments", number(mask.boundaries.length + 1)]);
  fill(byId("facts"), [...rows, ...Object.entries(mask.facts)]);
}

function showBlocks() {
  blocks = blockStates(mask, Number(byId("size").value));
  const all = blocks.lines * blocks.columns, share = count => `${number(count)}  (${percent(count / all)})`;
  fill(byId("blocks"), [["full", share(blocks.full), "--full"], ["partial", share(blocks.partial), "--partial"], ["empty", share(blocks.empty), "--empty"]]);
}

function chooseMask(index) {
  const before = mask;
  mask = masks[index];
  byId("mask").value = index;
  byId("query").max = mask.queries - 1;
  if (pinned !== null && pinned >= mask.queries) pinned = null;
  pointer = null;
  if (!view || before.queries !== mask.queries || before.keys !== mask.keys) view = fit();
  const longest = Math.max(mask.queries, mask.keys), wanted = Number(byId("size").value) || data.block_size;
  const sizes = new Set([1, 2, 4, 8, 16, 32, 64, 128, 256, 512, data.block_size].filter(size => longest / size <= MOST_BLOCKS));
  byId("size").replaceChildren(...[...sizes].sort((a, b) => a - b).map(size => new Option(size, size)));
  byId("size").value = sizes.has(wanted) ? wanted : Math.max(...sizes);
  showMask();
  showBlocks();
  showQuery();
  moved();
}

// Pin a query, and scroll it and one of its visible keys into view.
function pin(query) {
  pinned = Math.min(Math.max(query, 0), mask.queries - 1);
  const { width, height } = plot(), intervals = keysOf(mask, pinned), [start, stop] = intervals[intervals.length - 1] ?? [0, 1];
  if (toY(pinned) < TOP || toY(pinned + 1) > TOP + height) view.query = pinned - height / 2 / view.tall;
  if (toX(stop) < LEFT || toX(start) > LEFT + width) view.key = stop - width / 2 / view.wide;
  showQuery();
  moved();
}

function tokenAt(event) {
  const key = Math.floor(view.key + (event.offsetX - LEFT) / view.wide), query = Math.floor(view.query + (event.offsetY - TOP) / view.tall);
  const { width, height } = plot(), inside = event.offsetX >= LEFT && event.offsetY >= TOP && event.offsetX <= LEFT + width && event.offsetY <= TOP + height;
  return inside && key >= 0 && key < mask.keys && query >= 0 && query < mask.queries ? { key, query } : null;
}

let drag = null;  // where the button was pressed, and whether the pointer has moved since
canvas.addEventListener("pointerdown", event => { drag = { x: event.offsetX, y: event.offsetY, far: false }; canvas.setPointerCapture(event.pointerId); });
canvas.addEventListener("pointermove", event => {
  if (drag) {
    const x = event.offsetX - drag.x, y = event.offsetY - drag.y;
    if (!drag.far && Math.hypot(x, y) < 4) return;
    view.key -= x / view.wide;
    view.query -= y / view.tall;
    drag = { x: event.offsetX, y: event.offsetY, far: true };
    canvas.classList.add("dragging");
    moved();
  }
  pointer = tokenAt(event);
  showQuery();
  redraw();
});
canvas.addEventListener("pointerup", event => {
  const click = drag && !drag.far, token = tokenAt(event);
  drag = null;
  canvas.classList.remove("dragging");
  if (click) { pinned = token && token.query !== pinned ? token.query : null; showQuery(); redraw(); }
});
canvas.addEventListener("pointercancel", () => { drag = null; canvas.classList.remove("dragging"); });
canvas.addEventListener("pointerleave", () => { pointer = null; showQuery(); redraw(); });
canvas.addEventListener("dblclick", () => { pinned = null; view = fit(); showQuery(); moved(); });
canvas.addEventListener("wheel", event => {
  event.preventDefault();
  zoom(Math.exp(-event.deltaY * (event.deltaMode ? 0.05 : 0.0015)), event.offsetX, event.offsetY);
  pointer = tokenAt(event);
  showQuery();
}, { passive: false });

window.addEventListener("keydown", event => {
  if (event.target.matches("input[type=number], select") || event.ctrlKey || event.metaKey || event.altKey) return;
  const { width, height } = plot(), across = width / view.wide / 8, down = height / view.tall / 8;
  const pan = (keys, queries) => { view.key += keys; view.query += queries; moved(); };
  const keys = {
    "+": () => zoomMiddle(1.5), "=": () => zoomMiddle(1.5), "-": () => zoomMiddle(1 / 1.5),
    "0": () => { view = fit(); moved(); }, "Escape": () => { pinned = null; showQuery(); redraw(); },
    "ArrowUp": () => event.shiftKey ? pan(0, -down) : pin((current() ?? 1) - 1),
    "ArrowDown": () => event.shiftKey ? pan(0, down) : pin((current() ?? -1) + 1),
    "ArrowLeft": () => pan(-across, 0), "ArrowRight": () => pan(across, 0),
    "b": () => byId("overlay").click(), "m": () => chooseMask((masks.indexOf(mask) + 1) % masks.length),
  };
  if (keys[event.key]) { event.preventDefault(); keys[event.key](); }
});

byId("title").textContent = document.title = data.title;
byId("mask").replaceChildren(...masks.map((entry, index) => new Option(entry.name, index)));
byId("mask").addEventListener("change", () => chooseMask(Number(byId("mask").value)));
byId("size").addEventListener("change", () => { showBlocks(); redraw(); });
byId("overlay").addEventListener("change", () => { base = null; redraw(); });
byId("query").addEventListener("input", () => { if (byId("query").value !== "") pin(Number(byId("query").value)); });
byId("in").addEventListener("click", () => zoomMiddle(1.5));
byId("out").addEventListener("click", () => zoomMiddle(1 / 1.5));
byId("reset").addEventListener("click", () => { view = fit(); moved(); });
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => { base = null; if (blocks) blocks.picture = null; redraw(); });
new ResizeObserver(() => { if (view.fitted) view = fit(); moved(); }).observe(canvas);
chooseMask(0);
