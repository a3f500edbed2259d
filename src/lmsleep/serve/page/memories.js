// The memories of whoever asks: what each has read, and what can be done with it.

import { $, api, drop, get, post } from "./api.js";
import { count } from "./sleep.js";

const rows = new Map(); // of the list, by the id of a memory
const busy = new Set(); // ids of memories that were being read when we last looked
let soon = null; // the next look at what is being read

export async function showMemories() {
  clearTimeout(soon);
  const all = [];
  for (let more = true, after = ""; more;) {
    const page = await get(`v1/memories?limit=100&after=${after}`);
    all.push(...page.data);
    [more, after] = [page.has_more, page.last_id];
  }
  const ids = new Set(all.map((memory) => memory.id));
  for (const [id, li] of rows) if (!ids.has(id)) { li.remove(); rows.delete(id); }
  for (const memory of all.reverse()) showMemory(memory);
  $("no-memory").hidden = rows.size > 0;
  showPicked();
  if (all.some((memory) => memory.reading)) soon = setTimeout(() => showMemories().catch(() => {}), 300);
}

function showMemory(memory) {
  let li = rows.get(memory.id);
  if (!li) {
    li = $("memory-row").content.firstElementChild.cloneNode(true);
    li.dataset.id = memory.id;
    rows.set(memory.id, li);
    $("list").prepend(li);
    wire(li, memory.id);
  }
  const find = (name) => li.querySelector(name);
  const name = memory.name || memory.id;
  find(".name").textContent = name;
  find(".question").setAttribute("aria-label", `Ask ${name} something`);
  find(".read-text textarea").setAttribute("aria-label", `Text for ${name} to read`);
  for (const what of ["read", "sleep", "fork", "download", "delete"]) {
    const button = find(`.${what}`);
    button.setAttribute("aria-label", `${button.textContent}: ${name}`);
  }
  const from = memory.parents.length > 1 ? ", merged" : memory.parents.length ? ", a fork" : "";
  const open = memory.window_tokens ? `, ${memory.window_tokens.toLocaleString()} in the open window` : "";
  find(".counts").textContent = `${count(memory.tokens, "token")}${open}, ${count(memory.sleeps, "sleep")}${from}`;
  find(".reading").hidden = !memory.reading;
  for (const what of [".read", ".sleep"]) find(what).disabled = memory.reading !== null;
  if (memory.reading) {
    const { read, total, tokens_a_second: speed } = memory.reading;
    Object.assign(find("progress"), { max: total, value: read });
    find("progress").setAttribute("aria-label", `Reading ${name}`);
    const left = speed ? `, ${Math.ceil((total - read) / speed)} s left` : "";
    find(".reading small").textContent = `${read.toLocaleString()} of ${count(total, "token")} read${left}`;
  }
  if (memory.error) say(li, memory.error, true);
  if (memory.reading) busy.add(memory.id);
  else if (busy.delete(memory.id) && !memory.error) tell(`${name} was read.`);
}

function say(li, text, bad = false) {
  const answer = li.querySelector(".answer");
  answer.textContent = text;
  answer.classList.toggle("error", bad);
}

function wire(li, id) {
  const find = (name) => li.querySelector(name);
  const on = (name, event, what) => find(name).addEventListener(event, async (happened) => {
    happened.preventDefault();
    say(li, "");
    li.setAttribute("aria-busy", "true");
    try {
      await what();
    } catch (error) {
      say(li, error.message, true);
    }
    li.removeAttribute("aria-busy");
    await showMemories().catch(() => {});
  });
  on(".ask-memory", "submit", async () => {
    const { answer } = await post(`v1/memories/${id}/ask`, { question: find(".question").value });
    say(li, answer || "It has nothing to say.");
  });
  on(".fork", "click", () => post(`v1/memories/${id}/fork`, { name: `${find(".name").textContent} (fork)` }));
  on(".sleep", "click", () => post(`v1/memories/${id}/sleep`));
  on(".read", "click", () => {
    const form = find(".read-text");
    form.hidden = !form.hidden;
    find(".read").setAttribute("aria-expanded", String(!form.hidden));
    if (!form.hidden) form.querySelector("textarea").focus();
  });
  on(".read-text", "submit", async () => {
    const form = find(".read-text"), field = form.querySelector("textarea");
    await post(`v1/memories/${id}/read`, { text: field.value });
    field.value = "";
    form.hidden = true;
    find(".read").setAttribute("aria-expanded", "false");
    find(".read").focus();
  });
  on(".delete", "click", async () => {
    if (!(await sure(`Delete “${find(".name").textContent}” for good?`))) return;
    await drop(`v1/memories/${id}`);
    $("memories-title").tabIndex = -1;
    $("memories-title").focus(); // what had the focus is gone
  });
  on(".download", "click", async () => {
    const file = await (await api(`v1/memories/${id}/content`)).blob();
    const link = document.createElement("a");
    link.href = URL.createObjectURL(file);
    link.download = `${find(".name").textContent.replace(/\.mem$/, "").replace(/[^\w.-]+/g, "-")}.mem`;
    link.click();
    URL.revokeObjectURL(link.href);
  });
  find(".pick").addEventListener("change", showPicked);
}

function sure(question) {
  $("sure-text").textContent = question;
  return new Promise((resolve) => {
    $("sure").returnValue = "";
    $("sure").onclose = () => resolve($("sure").returnValue === "yes");
    $("sure").showModal();
  });
}

const picked = () => [...rows.values()].filter((li) => li.querySelector(".pick").checked);

function showPicked() {
  const many = picked().length;
  $("merge").disabled = many < 2;
  $("merge").textContent = many > 1 ? `Merge ${many}` : "Merge";
}

export async function merge() {
  const parts = picked(), name = parts.map((li) => li.querySelector(".name").textContent).join(" + ");
  try {
    await post("v1/memories/merge", { memories: parts.map((li) => li.dataset.id), name: name.slice(0, 200) });
    for (const li of parts) li.querySelector(".pick").checked = false;
    tell("Merged.");
  } catch (error) {
    tell(error.message, true);
  }
  await showMemories().catch(() => {});
}

function tell(text, bad = false) {
  $("taken").textContent = text;
  $("taken").classList.toggle("error", bad);
}

/** Take files, one after the other: memories are brought back, texts read. */
export async function take(files) {
  for (const file of files) {
    tell(`Sending ${file.name} …`);
    try {
      if (file.name.endsWith(".mem")) {
        await api(`v1/memories/upload?name=${encodeURIComponent(file.name.slice(0, -4))}`, { method: "POST", body: file });
        tell(`${file.name} is back.`);
      } else {
        const { id } = await post("v1/memories", { name: file.name.slice(0, 200), text: await textOf(file) });
        busy.add(id);
        tell(`${file.name} is being read.`);
      }
    } catch (error) {
      tell(`${file.name}: ${error.message}`, true);
      return;
    }
    await showMemories().catch(() => {});
  }
}

async function textOf(file) {
  let text;
  try {
    text = new TextDecoder("utf-8", { fatal: true }).decode(await file.arrayBuffer());
  } catch {
    throw new Error("this is no text in UTF-8.");
  }
  if (!text.trim()) throw new Error("there is nothing in it.");
  return text;
}
