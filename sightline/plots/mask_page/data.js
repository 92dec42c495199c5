"use strict";
// What the page knows of a mask: pure functions of its data, without document or canvas.

// Runs [step, repeats, step, repeats, ...] back into integers.
function decode(runs) {
  let length = 0;
  for (let i = 1; i < runs.length; i += 2) length += runs[i];
  const values = new Int32Array(length);
  for (let i = 0, at = 0, value = 0; i < runs.length; i += 2)
    for (let n = 0; n < runs[i + 1]; n++) values[at++] = value += runs[i];
  return values;
}

function decodeMask(data) {
  return { ...data, start: data.start.map(decode), stop: data.stop.map(decode), parts: decode(data.parts) };
}

// The runs of keys [start, stop) that a query sees.
function keysOf(mask, query) {
  const intervals = [];
  for (let k = 0; k < mask.start.length; k++)
    if (mask.start[k][query] < mask.stop[k][query]) intervals.push([mask.start[k][query], mask.stop[k][query]]);
  return intervals;
}

const countKeys = intervals => intervals.reduce((sum, [start, stop]) => sum + stop - start, 0);

function countPairs(mask) {
  let pairs = 0;
  for (let query = 0; query < mask.queries; query++) pairs += countKeys(keysOf(mask, query));
  return pairs;
}

// Visible pairs in each cell of `tall` queries x `wide` keys, of a grid whose first cell begins at (firstQuery, firstKey).
// The keys from x on fill a part of the cell that x lies in and all of the cells right of it: two numbers in neighbouring
// places of a prefix sum. Cells may be fractions of tokens; a query counts where it begins.
function pairsInCells(mask, firstQuery, firstKey, tall, wide, lines, columns) {
  const steps = new Float64Array(lines * (columns + 1)), queriesOfLine = new Int32Array(lines);
  const end = firstKey + columns * wide;
  const add = (line, x, sign) => {
    if (x >= end) return;
    const column = Math.min(columns - 1, Math.max(0, Math.floor((x - firstKey) / wide)));
    const rest = Math.max(0, x - firstKey - column * wide);
    steps[line * (columns + 1) + column] += sign * (wide - rest);
    steps[line * (columns + 1) + column + 1] += sign * rest;
  };
  const first = Math.max(0, Math.ceil(firstQuery)), last = Math.min(mask.queries, Math.ceil(firstQuery + lines * tall));
  for (let query = first; query < last; query++) {
    const line = Math.floor((query - firstQuery) / tall);
    if (line >= lines) break;
    queriesOfLine[line]++;
    for (let k = 0; k < mask.start.length; k++) {
      const start = mask.start[k][query], stop = mask.stop[k][query];
      if (start < stop) { add(line, start, 1); add(line, stop, -1); }
    }
  }
  const pairs = new Float64Array(lines * columns);
  for (let line = 0; line < lines; line++)
    for (let column = 0, sum = 0; column < columns; column++)
      pairs[line * columns + column] = sum += steps[line * (columns + 1) + column];
  return { pairs, queriesOfLine };
}

// 0 empty, 1 partial, 2 full. Like FlexAttention's, a block that hangs over the edge of the mask is never full.
function blockStates(mask, size) {
  const lines = Math.ceil(mask.queries / size), columns = Math.ceil(mask.keys / size);
  const { pairs } = pairsInCells(mask, 0, 0, size, size, lines, columns);
  const counts = [0, 0, 0];
  const states = Uint8Array.from(pairs, visible => visible === 0 ? 0 : visible === size * size ? 2 : 1);
  for (const state of states) counts[state]++;
  return { lines, columns, states, empty: counts[0], partial: counts[1], full: counts[2] };
}

// The first and last token of the part that a query lies in, or null where the mask says nothing of parts.
function partOf(mask, query) {
  if (mask.queries !== mask.keys) return null;
  let low = 0, high = mask.parts.length;  // parts[low] is the first separation after the query
  while (low < high) {
    const middle = (low + high) >> 1;
    if (mask.parts[middle] <= query) low = middle + 1; else high = middle;
  }
  return { number: low, start: low ? mask.parts[low - 1] : 0, stop: low < mask.parts.length ? mask.parts[low] : mask.keys };
}
