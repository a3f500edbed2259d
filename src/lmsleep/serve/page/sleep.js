// The figures beside a conversation: how full the window is, when the model slept, what that changed.

import { $, get } from "./api.js";

const MOST = 80; // pieces that are drawn, the newest
const HEIGHT = 90, HALF = 42; // awake above, asleep below
const NOTHING = { tokens: 0, sleeps: 0, window_tokens: 0 };

let model = { window: null, passes: 1 };
let stream = NOTHING;
// What happened, in order: {from, to}: the window filled from and to so many tokens; {asleep: true}: a sleep.
let pieces = [];

export const figures = () => ({ stream, pieces });

export function setModel(found) {
  model = found;
  draw();
}

/** Go back to figures that were kept, or to none. */
export function setFigures(kept) {
  ({ stream, pieces } = kept ?? { stream: NOTHING, pieces: [] });
  draw();
}

/** Take up where the stream is now, and draw what must have happened since. */
export function happened({ what, ...now }) {
  const read = now.tokens - stream.tokens, sleeps = now.sleeps - stream.sleeps;
  let filled = stream.window_tokens;
  if (sleeps > 0) {
    // All windows but the first of these were full; the first may have been slept on early, or late.
    const first = filled + read - now.window_tokens - (sleeps - 1) * (model.window ?? 0);
    for (let i = 0; i < sleeps; i++) {
      fill(filled, i ? model.window ?? 0 : first);
      pieces.push({ asleep: true });
      filled = 0;
    }
  }
  fill(filled, now.window_tokens);
  stream = now;
  pieces = pieces.slice(-2 * MOST);
  draw(what === "sleeping");
}

function fill(from, to) {
  const last = pieces.at(-1);
  if (last && !last.asleep && last.to === from) last.to = to;
  else if (to > from) pieces.push({ from, to });
}

function draw(asleep = false) {
  const { tokens, sleeps, window_tokens } = stream;
  // What sleeps has read its window to the end, which nobody was told yet.
  const filled = asleep ? Math.max(window_tokens, model.window ?? 0) : window_tokens;
  const most = model.window ?? Math.max(filled, 1);
  $("phase").textContent = asleep ? `asleep: ${passes()}` : "awake";
  $("phase").dataset.phase = asleep ? "asleep" : "awake";
  $("window").setAttribute("aria-valuemax", most);
  $("window").setAttribute("aria-valuenow", Math.min(filled, most));
  $("window").setAttribute("aria-valuetext", `${filled} of ${most} tokens`);
  $("window").firstElementChild.style.width = `${Math.min(100, (100 * filled) / most)}%`;
  const due = !asleep && filled > most ? ", a sleep is due" : "";
  $("window-said").textContent = `${filled.toLocaleString()} of ${model.window?.toLocaleString() ?? "any number of"} tokens${due}`;
  const said = `${count(tokens, "token")} read, ${count(sleeps, "sleep")}`;
  $("sleeps-said").textContent = said;
  $("hypnogram").setAttribute("aria-label", `Hypnogram: ${said}${sleeps ? ` of ${passes()}` : ""}`);
  drawHypnogram(asleep ? [...pieces, { from: window_tokens, to: filled }, { asleep }] : pieces);
}

export const count = (n, one, many = `${one}s`) => `${n.toLocaleString()} ${n === 1 ? one : many}`;
const passes = () => count(model.passes, "pass", "passes");

function drawHypnogram(all) {
  const svg = $("hypnogram"), shown = all.slice(-MOST);
  const L = model.window ?? Math.max(1, ...shown.map((piece) => piece.to ?? 0));
  // A sleep is half as wide as a window, so that its passes can be told apart.
  const width = (piece) => (piece.asleep ? L / 2 : piece.to - piece.from);
  // At least four windows, so that the first tokens do not fill the whole picture.
  const scale = 600 / Math.max(shown.reduce((sum, piece) => sum + width(piece), 0), 4 * L);
  const made = [shape("line", { x1: 0, x2: 600, y1: HALF + 3, y2: HALF + 3 })];
  let x = 0;
  for (const piece of shown) {
    const end = x + scale * width(piece);
    if (piece.asleep) {
      const N = Math.min(model.passes, 12), step = (end - x) / N;
      for (let n = 0; n < N; n++) {
        // Each pass goes deeper.
        const depth = ((HEIGHT - HALF - 10) * (n + 1)) / N;
        made.push(shape("rect", { class: "asleep", x: x + n * step, y: HALF + 6, width: 0.85 * step, height: depth }));
      }
    } else {
      const top = (tokens) => HALF - (HALF - 4) * Math.min(1, tokens / L);
      made.push(shape("polygon", { class: "awake", points: `${x},${HALF} ${x},${top(piece.from)} ${end},${top(piece.to)} ${end},${HALF}` }));
    }
    x = end;
  }
  svg.replaceChildren(...made);
}

function shape(name, attributes) {
  const made = document.createElementNS("http://www.w3.org/2000/svg", name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  return made;
}

/** Show what a response changed in the fast weights, head by head. */
export async function showChanged(response) {
  if (!$("changed").open) return;
  if (!response) return $("heads").replaceChildren("Nothing was said yet.");
  const { heads } = await get(`v1/responses/${response}/changed`);
  if (!heads.length) return $("heads").replaceChildren("This model has no fast weights.");
  const most = Math.max(...heads.map((head) => head.difference), 1e-12);
  const table = document.createElement("table");
  const top = table.createTHead().insertRow();
  for (const text of ["Block", "Head", "Norm of the change", "Cosine"]) {
    const th = document.createElement("th");
    th.scope = "col";
    th.textContent = text;
    if (text === "Norm of the change") th.colSpan = 2;
    top.append(th);
  }
  const body = table.createTBody();
  for (const { block, head, difference, cosine } of heads) {
    const row = body.insertRow();
    for (const text of [block, head, difference.toPrecision(3)]) row.insertCell().textContent = text;
    const bar = document.createElement("i");
    bar.style.width = `${(100 * difference) / most}%`;
    const cell = row.insertCell();
    cell.className = "bar";
    cell.append(bar);
    row.insertCell().textContent = cosine.toFixed(3);
  }
  return $("heads").replaceChildren(table);
}
