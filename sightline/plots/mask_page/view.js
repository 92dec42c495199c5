"use strict";
// What the page shows: canvas, panel, pointer and keyboard. The functions of data.js say what there is to show.
const data = JSON.parse(document.getElementById("data").textContent);
const masks = data.masks.map(decodeMask);
const at = id => document.getElementById(id);
const canvas = at("canvas"), context = canvas.getContext("2d");
const LEFT = 62, TOP = 40;          // room for the axes, CSS pixels
const LARGEST_TOKEN = 48;           // deepest zoom, CSS pixels a token
const MOST_BLOCKS = 2048;           // a side; smaller blocks would be finer than any screen
const number = value => value.toLocaleString("en-US");
const percent = value => (100 * value).toFixed(value > 0 && value < 0.1 ? 2 : 1) + " %";

let mask = masks[0];
let view = null;                    // { key, query: token at the upper left corner; wide, tall: CSS pixels a token; whole: untouched }
let pointer = null;                 // { key, query } under the pointer
let held = null;                    // the query that a click or the keyboard holds
let blocks = null;                  // blockStates of this mask and block size
let base = null;                    // the drawn mask, until view, mask or colours change
let waiting = false;

const plot = () => ({ width: Math.max(1, canvas.clientWidth - LEFT - 10), height: Math.max(1, canvas.clientHeight - TOP - 10) });
const style = name => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
const rgb = name => [1, 3, 5].map(place => parseInt(style(name).slice(place, place + 2), 16));
const toX = key => LEFT + (key - view.key) * view.wide;
const toY = query => TOP + (query - view.query) * view.tall;
const chosen = () => held ?? pointer?.query ?? null;

function fit() {
  const { width, height } = plot();
  let wide = width / mask.keys, tall = height / mask.queries;
  if (Math.max(wide / tall, tall / wide) < 5) wide = tall = Math.min(wide, tall);  // square tokens, unless far from it
  return { key: 0, query: 0, wide, tall, whole: true };
}

function keepInView() {
  const { width, height } = plot();
  const keep = (first, shown, length) => Math.max(0, Math.min(first, length - shown));
  view.key = keep(view.key, width / view.wide, mask.keys);
  view.query = keep(view.query, height / view.tall, mask.queries);
}

function zoom(factor, x, y) {
  const whole = fit(), key = view.key + (x - LEFT) / view.wide, query = view.query + (y - TOP) / view.tall;
  const limit = (now, least) => Math.min(Math.max(now * factor, least), Math.max(least, LARGEST_TOKEN));
  view.wide = limit(view.wide, whole.wide);
  view.tall = limit(view.tall, whole.tall);
  view.key = key - (x - LEFT) / view.wide;
  view.query = query - (y - TOP) / view.tall;
  view.whole = false;
  moved();
}

function zoomMiddle(factor) {
  const { width, height } = plot();
  zoom(factor, LEFT + width / 2, TOP + height / 2);
}

function moved() { keepInView(); base = null; redraw(); }
function redraw() { if (!waiting) { waiting = true; requestAnimationFrame(() => { waiting = false; draw(); }); } }

// What the canvas shows of the mask, one cell a pixel or, closer, one cell a token: always from the intervals.
function drawBase(ratio) {
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
  const [red, green, blue] = rgb("--ink"), darkest = at("overlay").checked ? 90 : 255;  // pale under the colours of blocks
  for (let line = 0, place = 0; line < lines; line++)
    for (let column = 0; column < columns; column++, place++) {
      const share = Math.min(1, pairs[place] / (queriesOfLine[line] * x.cell || 1));
      image.data.set([red, green, blue, share < 1e-6 ? 0 : darkest * (0.16 + 0.84 * share)], 4 * place);
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
  base ??= drawBase(ratio);
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
  if (at("overlay").checked) drawBlocks();
  drawQuery();
  drawLines();
  context.restore();
  context.strokeStyle = style("--part");
  context.strokeRect(Math.max(LEFT, toX(0)) - 0.5, Math.max(TOP, toY(0)) - 0.5,
    Math.min(width, mask.keys * view.wide) + 1, Math.min(height, mask.queries * view.tall) + 1);
  drawAxes();
}

function drawBlocks() {
  const size = Number(at("size").value);
  blocks ??= blockStates(mask, size);
  if (!blocks.picture) {
    blocks.picture = new OffscreenCanvas(blocks.columns, blocks.lines);
    const pen = blocks.picture.getContext("2d"), image = pen.createImageData(blocks.columns, blocks.lines);
    const colours = [[...rgb("--empty"), 0], [...rgb("--partial"), 130], [...rgb("--full"), 150]];
    blocks.states.forEach((state, place) => image.data.set(colours[state], 4 * place));
    pen.putImageData(image, 0, 0);
  }
  context.drawImage(blocks.picture, toX(0), toY(0), blocks.columns * size * view.wide, blocks.lines * size * view.tall);
  context.globalAlpha = 0.4;
  if (size * Math.min(view.wide, view.tall) >= 8) drawGrid(size, style("--part"));
  context.globalAlpha = 1;
}

function drawGrid(step, colour) {
  const { width, height } = plot();
  context.strokeStyle = colour;
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

// Single tokens where they are large enough, and a frame around each part that sees nothing of the others.
function drawLines() {
  const { width } = plot();
  if (Math.min(view.wide, view.tall) >= 8) drawGrid(1, style("--line"));
  if (!mask.parts.length) return;
  const bounds = [0, ...mask.parts, mask.keys];
  const shown = [...mask.parts, mask.keys].map((stop, number) => ({ start: bounds[number], stop }))
    .filter(({ start, stop }) => toX(stop) >= LEFT && toX(start) <= LEFT + width);
  if (shown.length > width / 6) return;
  context.strokeStyle = style("--part");
  context.lineWidth = 1;
  context.setLineDash([4, 3]);
  for (const { start, stop } of shown) {
    const x = Math.round(toX(start)) - 0.5, y = Math.round(toY(start)) - 0.5;
    context.strokeRect(x, y, Math.round(toX(stop)) - 0.5 - x, Math.round(toY(stop)) - 0.5 - y);
  }
  context.setLineDash([]);
}

function drawQuery() {
  const query = chosen(), { width, height } = plot();
  if (query === null) return;
  const tall = Math.max(view.tall, 2), y = toY(query + 0.5) - tall / 2;
  context.globalAlpha = 0.8;
  context.fillStyle = style("--band");
  context.fillRect(LEFT, y, width, tall);
  context.globalAlpha = 1;
  context.fillStyle = style("--chosen");
  for (const [start, stop] of keysOf(mask, query))
    context.fillRect(toX(start), y, Math.max(1.5, (stop - start) * view.wide), tall);
  if (!pointer) return;
  context.globalAlpha = 0.5;
  context.fillRect(toX(pointer.key + 0.5) - 0.5, TOP, 1, height);
  context.globalAlpha = 1;
}

function drawAxes() {
  const { width, height } = plot(), query = chosen();
  context.font = "11px system-ui, 'DejaVu Sans', sans-serif";
  context.fillStyle = style("--soft");
  const step = room => { let tokens = 1; while (tokens < room) tokens *= 2; return tokens; };
  const middle = size => size >= 14 ? 0.5 : 0;  // large tokens have their number at their middle
  context.textAlign = "center";
  const keyStep = step((7 * String(mask.keys).length + 14) / view.wide);
  for (let key = Math.max(0, Math.ceil(view.key / keyStep) * keyStep); key < mask.keys; key += keyStep) {
    const x = toX(key + middle(view.wide));
    if (x > LEFT + width - 4 * String(key).length + 8) break;
    if (x >= LEFT - 1) { context.fillText(key, x, TOP - 9); context.fillRect(x - 0.5, TOP - 6, 1, 4); }
  }
  context.textAlign = "right";
  const queryStep = step(26 / view.tall);
  for (let at = Math.max(0, Math.ceil(view.query / queryStep) * queryStep); at < mask.queries; at += queryStep) {
    const y = toY(at + middle(view.tall));
    if (y > TOP + height) break;
    if (y >= TOP - 1) { context.fillText(at, LEFT - 10, y + 4); context.fillRect(LEFT - 6, y - 0.5, 4, 1); }
  }
  context.textAlign = "left";
  context.fillText("key \u2192", Math.max(LEFT, toX(0)), 14);
  context.fillText("query \u2193", 8, 14);
  if (query === null) return;
  context.fillStyle = style("--chosen");
  for (const [start, stop] of keysOf(mask, query)) {
    const from = Math.max(LEFT, toX(start)), to = Math.min(LEFT + width, toX(stop));
    if (to >= from) context.fillRect(from, TOP - 4, Math.max(1.5, to - from), 3);
  }
  const y = toY(query + 0.5);
  if (y >= TOP && y <= TOP + height) context.fillRect(LEFT - 4, y - Math.max(view.tall, 3) / 2, 3, Math.max(view.tall, 3));
}

function fill(table, rows) {
  table.replaceChildren(...rows.map(([label, value, colour]) => {
    const row = document.createElement("tr"), left = row.insertCell(), right = row.insertCell();
    left.textContent = label;
    right.textContent = value;
    if (colour) {
      const swatch = document.createElement("span");
      swatch.className = "swatch";
      swatch.style.background = `var(${colour})`;
      left.prepend(swatch);
    }
    return row;
  }));
}

function tellQuery() {
  const query = chosen();
  if (document.activeElement !== at("query")) at("query").value = query ?? "";
  if (query === null) { at("chosen").textContent = "Point at the picture."; at("keys").replaceChildren(); return; }
  const intervals = keysOf(mask, query), keys = countKeys(intervals), part = partOf(mask, query);
  const rows = [["query", number(query) + (held === null ? "" : " (held)")]];
  if (part && mask.parts.length) rows.push([`part ${number(part.number)}`, `${number(part.start)} to ${number(part.stop - 1)}`]);
  rows.push(["sees", keys ? `${number(keys)} keys` : "nothing: its output is zero"]);
  if (pointer) rows.push([`key ${number(pointer.key)}`, intervals.some(([a, b]) => a <= pointer.key && pointer.key < b) ? "visible" : "not visible"]);
  const summary = document.createElement("table"), list = document.createElement("table");
  fill(summary, rows);
  fill(list, intervals.slice(0, 200).map(([start, stop]) => [`[${start}, ${stop})`, number(stop - start)]));
  if (intervals.length > 200) list.insertRow().insertCell().textContent = `and ${number(intervals.length - 200)} more`;
  at("chosen").replaceChildren(summary);
  at("keys").replaceChildren(list);
}

function tellMask() {
  const pairs = countPairs(mask), square = mask.queries === mask.keys;
  const rows = square ? [["tokens (S)", number(mask.keys)]] : [["queries (Q)", number(mask.queries)], ["keys (T)", number(mask.keys)]];
  rows.push(["intervals a query (K)", mask.start.length], ["visible pairs", number(pairs)]);
  if (square) rows.push(["share of causal", percent(pairs / (mask.keys * (mask.keys + 1) / 2))]);
  rows.push(["sparsity", percent(1 - pairs / (mask.queries * mask.keys))]);
  if (square) rows.push(["separate parts", number(mask.parts.length + 1)]);
  fill(at("facts"), [...rows, ...Object.entries(mask.facts)]);
}

function tellBlocks() {
  blocks = blockStates(mask, Number(at("size").value));
  const all = blocks.lines * blocks.columns, share = count => `${number(count)}  (${percent(count / all)})`;
  fill(at("blocks"), [["full", share(blocks.full), "--full"], ["partial", share(blocks.partial), "--partial"], ["empty", share(blocks.empty), "--empty"]]);
}

function chooseMask(index) {
  const before = mask;
  mask = masks[index];
  at("mask").value = index;
  at("query").max = mask.queries - 1;
  if (held !== null && held >= mask.queries) held = null;
  pointer = null;
  if (!view || before.queries !== mask.queries || before.keys !== mask.keys) view = fit();
  const longest = Math.max(mask.queries, mask.keys), wanted = Number(at("size").value) || data.block_size;
  const sizes = new Set([1, 2, 4, 8, 16, 32, 64, 128, 256, 512, data.block_size].filter(size => longest / size <= MOST_BLOCKS));
  at("size").replaceChildren(...[...sizes].sort((a, b) => a - b).map(size => new Option(size, size)));
  at("size").value = sizes.has(wanted) ? wanted : Math.max(...sizes);
  tellMask();
  tellBlocks();
  tellQuery();
  moved();
}

// Hold a query and bring it, and a key that it sees, into view.
function hold(query) {
  held = Math.min(Math.max(query, 0), mask.queries - 1);
  const { width, height } = plot(), intervals = keysOf(mask, held), [start, stop] = intervals[intervals.length - 1] ?? [0, 1];
  if (toY(held) < TOP || toY(held + 1) > TOP + height) view.query = held - height / 2 / view.tall;
  if (toX(stop) < LEFT || toX(start) > LEFT + width) view.key = stop - width / 2 / view.wide;
  tellQuery();
  moved();
}

function tokenAt(event) {
  const key = Math.floor(view.key + (event.offsetX - LEFT) / view.wide), query = Math.floor(view.query + (event.offsetY - TOP) / view.tall);
  const { width, height } = plot(), inside = event.offsetX >= LEFT && event.offsetY >= TOP && event.offsetX <= LEFT + width && event.offsetY <= TOP + height;
  return inside && key >= 0 && key < mask.keys && query >= 0 && query < mask.queries ? { key, query } : null;
}

let drag = null;  // where the button went down, and whether the pointer moved since
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
  tellQuery();
  redraw();
});
canvas.addEventListener("pointerup", event => {
  const click = drag && !drag.far, token = tokenAt(event);
  drag = null;
  canvas.classList.remove("dragging");
  if (click) { held = token && token.query !== held ? token.query : null; tellQuery(); redraw(); }
});
canvas.addEventListener("pointercancel", () => { drag = null; canvas.classList.remove("dragging"); });
canvas.addEventListener("pointerleave", () => { pointer = null; tellQuery(); redraw(); });
canvas.addEventListener("dblclick", () => { held = null; view = fit(); tellQuery(); moved(); });
canvas.addEventListener("wheel", event => {
  event.preventDefault();
  zoom(Math.exp(-event.deltaY * (event.deltaMode ? 0.05 : 0.0015)), event.offsetX, event.offsetY);
  pointer = tokenAt(event);
  tellQuery();
}, { passive: false });

window.addEventListener("keydown", event => {
  if (event.target.matches("input[type=number], select") || event.ctrlKey || event.metaKey || event.altKey) return;
  const { width, height } = plot(), across = width / view.wide / 8, down = height / view.tall / 8;
  const pan = (keys, queries) => { view.key += keys; view.query += queries; moved(); };
  const keys = {
    "+": () => zoomMiddle(1.5), "=": () => zoomMiddle(1.5), "-": () => zoomMiddle(1 / 1.5),
    "0": () => { view = fit(); moved(); }, "Escape": () => { held = null; tellQuery(); redraw(); },
    "ArrowUp": () => event.shiftKey ? pan(0, -down) : hold((chosen() ?? 1) - 1),
    "ArrowDown": () => event.shiftKey ? pan(0, down) : hold((chosen() ?? -1) + 1),
    "ArrowLeft": () => pan(-across, 0), "ArrowRight": () => pan(across, 0),
    "b": () => at("overlay").click(), "m": () => chooseMask((masks.indexOf(mask) + 1) % masks.length),
  };
  if (keys[event.key]) { event.preventDefault(); keys[event.key](); }
});

at("title").textContent = document.title = data.title;
at("mask").replaceChildren(...masks.map((entry, index) => new Option(entry.name, index)));
at("mask").addEventListener("change", () => chooseMask(Number(at("mask").value)));
at("size").addEventListener("change", () => { tellBlocks(); redraw(); });
at("overlay").addEventListener("change", () => { base = null; redraw(); });
at("query").addEventListener("input", () => { if (at("query").value !== "") hold(Number(at("query").value)); });
at("in").addEventListener("click", () => zoomMiddle(1.5));
at("out").addEventListener("click", () => zoomMiddle(1 / 1.5));
at("reset").addEventListener("click", () => { view = fit(); moved(); });
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => { base = null; if (blocks) blocks.picture = null; redraw(); });
new ResizeObserver(() => { if (view.whole) view = fit(); moved(); }).observe(canvas);
chooseMask(0);
