"use strict";
// Decoding and statistics of a mask: pure functions of its data, without document or canvas.

// Decode runs [step, repeats, step, repeats, ...] to integers.
function decode(runs) {
  let length = 0;
  for (let i = 1; i < runs.length; i += 2) length += runs[i];
  const values = new Int32Array(length);
  for (let i = 0, index = 0, value = 0; i < runs.length; i += 2)
    for (let n = 0; n < runs[i + 1]; n++) values[index++] = value += runs[i];
  return values;
}

function decodeMask(data) {
  return { ...data, start: data.start.map(decode), stop: data.stop.map(decode), boundaries: decode(data.boundaries) };
}

// The intervals of keys [start, stop) visible to a query.
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

// Visible pairs in each cell of `tall` queries x `wide` keys, for a grid that starts at (firstQuery, firstKey).
// The keys >= x cover a part of the cell that contains x and all later cells: the prefix sum of two adjacent entries.
// Cells may be fractions of tokens; a query belongs to the cell that contains its first edge.
function pairsInCells(mask, firstQuery, firstKey, tall, wide, lines, columns) {
  const steps = new Float64Array(lines * (columns + 1)), queriesOfLine = new Int32Array(lines);
  const end = firstKey + columns * wide;
  const add = (line, x, sign) => {
    if (x >= end) return;
    const column = Math.min(columns - 1, Math.max(0, Math.floor((x - firstKey) / wide)));
    const remainder = Math.max(0, x - firstKey - column * wide);
    steps[line * (columns + 1) + column] += sign * (wide - remainder);
    steps[line * (columns + 1) + column + 1] += sign * remainder;
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

// States of the blocks: 0 empty, 1 partial, 2 full. As in FlexAttention, a block that extends past the mask is never full.
function blockStates(mask, size) {
  const lines = Math.ceil(mask.queries / size), columns = Math.ceil(mask.keys / size);
  const { pairs } = pairsInCells(mask, 0, 0, size, size, lines, columns);
  const counts = [0, 0, 0];
  const states = Uint8Array.from(pairs, visible => visible === 0 ? 0 : visible === size * size ? 2 : 1);
  for (const state of states) counts[state]++;
  return { lines, columns, states, empty: counts[0], partial: counts[1], full: counts[2] };
}

// The number, start and stop of the segment that contains a query, or null if queries and keys are different tokens.
function segmentOf(mask, query) {
  if (mask.queries !== mask.keys) return null;
  let low = 0, high = mask.boundaries.length;  // boundaries[low] is the first boundary after the query
  while (low < high) {
    const middle = (low + high) >> 1;
    if (mask.boundaries[middle] <= query) low = middle + 1; else high = middle;
  }
  return { number: low, start: low ? mask.boundaries[low - 1] : 0, stop: low < mask.boundaries.length ? mask.boundaries[low] : mask.keys };
}
