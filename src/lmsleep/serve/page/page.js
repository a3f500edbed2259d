// The page speaks to the same API as everybody else, at the address that it came from.
const $ = (name) => document.getElementById(name);
const state = { model: null, window: null, passes: 1, last: null, key: sessionStorage.getItem("key") ?? "", naps: [], stop: null };

// Requests

async function api(path, options = {}) {
  const headers = { ...(options.headers ?? {}) };
  if (state.key) headers.Authorization = `Bearer ${state.key}`;
  let body = options.body;
  if (options.json !== undefined) {
    headers["Content-Type"] = "application/json";
    body = JSON.stringify(options.json);
  }
  let answer;
  try {
    answer = await fetch(path, { ...options, headers, body });
  } catch (error) {
    if (error.name !== "AbortError") gone();
    throw error;
  }
  if (answer.status === 401) {
    await askForKey();
    return api(path, options);
  }
  if (!answer.ok) {
    const said = await answer.json().catch(() => null);
    throw new Error(said?.error?.message ?? `the server answered ${answer.status}`);
  }
  return answer;
}

const get = async (path) => (await api(path)).json();
const post = async (path, json = {}) => (await api(path, { method: "POST", json })).json();

function askForKey() {
  return new Promise((resolve) => {
    $("key").addEventListener("close", () => {
      state.key = $("key-text").value;
      sessionStorage.setItem("key", state.key);
      resolve();
    }, { once: true });
    if (!$("key").open) $("key").showModal();
  });
}

// A server that goes away comes back to the same conversation: its streams are on disk.

let waiting = false;
async function gone() {
  if (waiting) return;
  waiting = true;
  $("connection").textContent = "The server cannot be reached; trying again …";
  for (;;) {
    await new Promise((resolve) => setTimeout(resolve, 1000));
    const ready = await fetch("ready").catch(() => null);
    if (ready?.ok) break;
  }
  waiting = false;
  $("connection").textContent = "";
  await begin().catch(() => {});
}

// The conversation

function remember() {
  const said = [...$("said").children].map((li) => ({ who: li.className, text: li.dataset.text ?? li.textContent }));
  sessionStorage.setItem("conversation", JSON.stringify({ last: state.last, naps: state.naps, said, stream: state.stream }));
}

function line(who, text) {
  const li = document.createElement("li");
  li.className = who;
  li.dataset.text = text;
  li.textContent = text;
  li.setAttribute("aria-label", who === "user" ? "You" : "Model");
  $("said").append(li);
  li.scrollIntoView({ block: "nearest" });
  return li;
}

function showStream(stream) {
  if (!stream) return;
  state.stream = stream;
  const { window_tokens: filled, tokens, sleeps } = stream;
  const most = state.window ?? Math.max(filled, 1);
  $("window").setAttribute("aria-valuemax", most);
  $("window").setAttribute("aria-valuenow", filled);
  $("window").firstElementChild.style.width = `${Math.min(100, (100 * filled) / most)}%`;
  $("window-said").textContent = `${filled} of ${state.window ?? "any number of"} tokens`;
  $("sleeps-said").textContent = `${tokens} tokens read, ${sleeps} sleeps of ${state.passes} passes`;
}

function showHypnogram() {
  // Time runs to the right: what was read and written awake, and the passes of every sleep below.
  const svg = $("hypnogram");
  svg.replaceChildren();
  const naps = state.naps.slice(-60);
  const total = naps.reduce((sum, nap) => sum + nap.tokens, 0) || 1;
  let x = 0;
  for (const { tokens, asleep } of naps) {
    const width = (600 * tokens) / total;
    const rect = document.createElementNS("http://www.w3.org/2000/svg", "rect");
    rect.setAttribute("class", asleep ? "asleep" : "awake");
    rect.setAttribute("x", x);
    rect.setAttribute("width", Math.max(width - 1, 0.5));
    rect.setAttribute("y", asleep ? 30 : 4);
    rect.setAttribute("height", asleep ? 26 : 20);
    svg.append(rect);
    x += width;
  }
  const sleeps = state.naps.filter((nap) => nap.asleep).length;
  svg.setAttribute("aria-label", `Awake and asleep over time: ${sleeps} sleeps`);
}

function happened(said) {
  const before = state.stream ?? { tokens: 0, sleeps: 0 };
  const read = said.tokens - before.tokens;
  if (read > 0) {
    const last = state.naps.at(-1);
    if (last && !last.asleep) last.tokens += read;
    else state.naps.push({ tokens: read, asleep: false });
  }
  for (let i = before.sleeps; i < said.sleeps; i++) state.naps.push({ tokens: (state.window ?? 1) / 4, asleep: true });
  showStream(said);
  showHypnogram();
}

async function* events(answer) {
  const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
  let text = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    text += value;
    let end;
    while ((end = text.indexOf("\n\n")) >= 0) {
      const block = text.slice(0, end);
      text = text.slice(end + 2);
      if (block.startsWith(": ")) yield { type: "comment", ...JSON.parse(block.slice(2)) };
      else yield JSON.parse(block.split("\n").find((one) => one.startsWith("data: ")).slice(6));
    }
  }
}

async function ask(event) {
  event.preventDefault();
  const input = $("question").value;
  if (!input.trim()) return;
  line("user", input);
  const answer = line("assistant", "");
  $("question").value = "";
  $("send").disabled = true;
  $("stop").hidden = false;
  state.stop = new AbortController();
  const json = { model: state.model, input, stream: true, stream_options: { include_state: true }, temperature: Number($("temperature").value) };
  if ($("longest").value) json.max_output_tokens = Number($("longest").value);
  if (state.last) json.previous_response_id = state.last;
  let complete = false;
  try {
    const stream = await api("v1/responses", { method: "POST", json, signal: state.stop.signal });
    for await (const said of events(stream)) {
      if (said.type === "comment") happened(said);
      if (said.type === "response.output_text.delta") {
        answer.textContent += said.delta;
        answer.dataset.text = answer.textContent;
        answer.scrollIntoView({ block: "nearest" });
      }
      if (said.type === "error") throw new Error(said.message);
      if (said.type === "response.completed" || said.type === "response.incomplete") {
        complete = true;
        state.last = said.response.id;
        happened(said.response.stream);
      }
    }
    if (!complete) throw new Error("the answer broke off");
    showChanged();
  } catch (error) {
    if (error.name === "AbortError") note(answer, "stopped; this turn is not part of the conversation");
    else note(answer, error.message, "error");
  }
  $("send").disabled = false;
  $("stop").hidden = true;
  remember();
  $("question").focus();
}

function note(li, text, kind = "") {
  const small = document.createElement("small");
  small.textContent = text;
  small.className = kind;
  li.append(small);
}

async function showChanged() {
  if (!$("changed").open || !state.last) return;
  const { heads } = await get(`v1/responses/${state.last}/changed`);
  const most = Math.max(...heads.map((head) => head.difference), 1e-9);
  const table = document.createElement("table");
  table.innerHTML = "<tr><th>block</th><th>head</th><th>change</th><th>norm of the change</th></tr>";
  for (const head of heads) {
    const row = table.insertRow();
    for (const text of [head.block, head.head, head.difference.toFixed(3)]) row.insertCell().textContent = text;
    const bar = document.createElement("i");
    bar.style.width = `${(10 * head.difference) / most}rem`;
    row.insertCell().append(bar);
  }
  $("heads").replaceChildren(heads.length ? table : "nothing yet");
}

function anew() {
  Object.assign(state, { last: null, naps: [], stream: null });
  $("said").replaceChildren();
  showStream({ tokens: 0, sleeps: 0, window_tokens: 0 });
  showHypnogram();
  remember();
  $("question").focus();
}

// Memories

const rows = new Map();

async function showMemories() {
  const { data } = await get("v1/memories?limit=100");
  const ids = new Set(data.map((memory) => memory.id));
  for (const [id, li] of rows) if (!ids.has(id)) { li.remove(); rows.delete(id); }
  for (const memory of data.reverse()) showMemory(memory);
  if (data.some((memory) => memory.status === "reading")) setTimeout(() => showMemories().catch(() => {}), 300);
}

function showMemory(memory) {
  let li = rows.get(memory.id);
  if (!li) {
    li = $("memory-row").content.firstElementChild.cloneNode(true);
    li.dataset.id = memory.id;
    rows.set(memory.id, li);
    $("list").prepend(li);
    wire(li, memory);
  }
  const find = (name) => li.querySelector(name);
  find(".name").textContent = memory.name || memory.id;
  find(".counts").textContent = `${memory.tokens} tokens, ${memory.sleeps} sleeps`;
  find(".error").hidden = !memory.error;
  find(".error").textContent = memory.error ?? "";
  const progress = find("progress");
  progress.hidden = !memory.reading;
  if (memory.reading) {
    progress.max = memory.reading.total;
    progress.value = memory.reading.read;
    progress.setAttribute("aria-label", `${memory.reading.read} of ${memory.reading.total} tokens read`);
  }
}

function wire(li, { id }) {
  const find = (name) => li.querySelector(name);
  const output = find("output");
  const doing = (what) => async (event) => {
    event.preventDefault();
    try {
      await what();
    } catch (error) {
      output.textContent = error.message;
    }
    await showMemories().catch(() => {});
  };
  find(".ask-memory").addEventListener("submit", doing(async () => {
    const question = find(".ask-memory input").value;
    output.textContent = "…";
    output.textContent = (await post(`v1/memories/${id}/ask`, { question })).answer;
  }));
  find(".fork").addEventListener("click", doing(() => post(`v1/memories/${id}/fork`)));
  find(".sleep").addEventListener("click", doing(() => post(`v1/memories/${id}/sleep`)));
  find(".read").addEventListener("click", doing(async () => {
    const text = prompt("Text to read into this memory");
    if (text) await post(`v1/memories/${id}/read`, { text });
  }));
  find(".delete").addEventListener("click", doing(async () => {
    if (confirm(`Delete ${find(".name").textContent}?`)) await api(`v1/memories/${id}`, { method: "DELETE" });
  }));
  find(".download").addEventListener("click", doing(async () => {
    const data = await (await api(`v1/memories/${id}/content`)).blob();
    const link = document.createElement("a");
    link.href = URL.createObjectURL(data);
    link.download = `${id}.mem`;
    link.click();
    URL.revokeObjectURL(link.href);
  }));
  find(".pick").addEventListener("change", () => { $("merge").disabled = picked().length < 2; });
}

const picked = () => [...rows.values()].filter((li) => li.querySelector(".pick").checked).map((li) => li.dataset.id);

async function merge() {
  try {
    await post("v1/memories/merge", { memories: picked(), name: "merged" });
    for (const li of rows.values()) li.querySelector(".pick").checked = false;
    $("merge").disabled = true;
  } catch (error) {
    $("drop-said").textContent = error.message;
  }
  await showMemories();
}

async function take(file) {
  try {
    if (file.name.endsWith(".mem")) await api(`v1/memories/upload?name=${encodeURIComponent(file.name)}`, { method: "POST", body: file });
    else await post("v1/memories", { name: file.name, text: await file.text() });
    $("drop-said").textContent = `${file.name} was taken.`;
  } catch (error) {
    $("drop-said").textContent = `${file.name}: ${error.message}`;
  }
  await showMemories();
}

// To begin with

async function begin() {
  const [model] = (await get("v1/models")).data;
  Object.assign(state, { model: model.id, window: model.window, passes: model.passes });
  $("model").textContent = `${model.id}: windows of ${model.window ?? "any number of"} tokens, ${model.passes} passes a sleep`;
  await showMemories();
}

$("ask").addEventListener("submit", ask);
$("question").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && !event.shiftKey) { event.preventDefault(); $("ask").requestSubmit(); }
});
$("stop").addEventListener("click", () => state.stop?.abort());
$("anew").addEventListener("click", anew);
$("merge").addEventListener("click", merge);
$("changed").addEventListener("toggle", () => showChanged().catch(() => {}));
$("file").addEventListener("change", () => { if ($("file").files[0]) take($("file").files[0]); $("file").value = ""; });
$("drop").addEventListener("click", () => $("file").click());
$("drop").addEventListener("keydown", (event) => { if (event.key === "Enter" || event.key === " ") { event.preventDefault(); $("file").click(); } });
for (const name of ["dragover", "dragleave", "drop"]) {
  $("drop").addEventListener(name, (event) => {
    event.preventDefault();
    $("drop").classList.toggle("over", name === "dragover");
    if (name === "drop") for (const file of event.dataTransfer.files) take(file);
  });
}
const kept = JSON.parse(sessionStorage.getItem("conversation") ?? "null");
if (kept) {
  Object.assign(state, { last: kept.last, naps: kept.naps ?? [], stream: kept.stream });
  for (const { who, text } of kept.said) line(who, text);
}
begin().then(() => { showStream(state.stream ?? { tokens: 0, sleeps: 0, window_tokens: 0 }); showHypnogram(); }).catch(() => {});
