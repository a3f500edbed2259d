// The conversation: every turn is a response that goes on from the one before.

import { $, api, away, drop } from "./api.js";
import { count, figures, happened, setFigures, showChanged } from "./sleep.js";

const KEPT = "lmsleep.conversation";

let model = null;
let responses = []; // ids of all turns, the newest last
let turns = []; // {question, answer, note, failed}: what is on the page
let stopping = null;
let early = false; // something was sent before the server has told what it serves

/** Begin with the model that answers, and with the conversation that this tab had. */
export function beginTalk(found) {
  model = found;
  $("welcome-text").textContent = welcome(found);
  const items = found.examples.map((text) => {
    const item = document.createElement("li"), button = document.createElement("button");
    button.type = "button";
    button.textContent = text;
    button.addEventListener("click", () => { $("question").value = text; $("question").focus(); });
    item.append(button);
    return item;
  });
  $("examples").replaceChildren(...items);
  $("examples").hidden = !items.length;
  if (early) $("ask").requestSubmit();
}

function welcome({ window, passes, words }) {
  const sleeps = window === null
    ? "This one never sleeps: its window holds any number of tokens."
    : `It reads into a window of ${count(window, "token")}. When that is full it sleeps: ${count(passes, "pass", "passes")} write what matters into its fast weights, and the window is forgotten. You see it happen beside this conversation.`;
  return words ? `${sleeps} This model was trained on one task and knows these words alone: ${words.join(" ")}.` : sleeps;
}

export function restore() {
  const kept = JSON.parse(sessionStorage.getItem(KEPT) ?? "null");
  responses = kept?.responses ?? [];
  turns = kept?.turns ?? [];
  $("said").replaceChildren();
  for (const turn of turns) show(turn);
  setFigures(kept?.figures);
  update();
}

function remember() {
  sessionStorage.setItem(KEPT, JSON.stringify({ responses, turns, figures: figures() }));
  update();
}

function update() {
  $("welcome").hidden = turns.length > 0;
  $("anew").disabled = !turns.length || stopping !== null;
}

/** Forget the conversation, here and on the server. */
export async function anew({ here = false } = {}) {
  stopping?.abort();
  const gone = responses;
  responses = [];
  turns = [];
  $("said").replaceChildren();
  $("heads").replaceChildren();
  setFigures(null);
  remember();
  if (!here) await Promise.allSettled(gone.map((id) => drop(`v1/responses/${id}`)));
}

function bubble(who, label, text) {
  const li = document.createElement("li"), said = document.createElement("div"), name = document.createElement("span");
  li.className = who;
  name.className = "unseen";
  name.textContent = label;
  said.className = "text";
  said.textContent = text;
  li.append(name, said);
  $("said").append(li);
  return li;
}

function show(turn) {
  turn.shown = { question: bubble("user", "You:", turn.question), answer: bubble("assistant", "Model:", turn.answer) };
  // What is only on the page is not kept.
  Object.defineProperty(turn, "shown", { enumerable: false });
  if (turn.note) note(turn);
  toEnd();
  return turn;
}

// Not by scrollIntoView: the Tab key would go on from there, past all that stands before.
const toEnd = () => { $("scroll").scrollTop = $("scroll").scrollHeight; };

function note(turn) {
  const li = turn.shown.answer, row = document.createElement("div"), small = document.createElement("small");
  small.textContent = turn.note;
  row.className = "row";
  row.append(small);
  if (turn.failed) {
    li.classList.add("failed");
    small.className = "error";
    const again = document.createElement("button");
    again.type = "button";
    again.textContent = "Take it back";
    again.addEventListener("click", () => takeBack(turn));
    row.append(again);
  }
  li.append(row);
  toEnd();
}

/** Put what was asked in vain back to where it was typed. */
function takeBack(turn) {
  turns = turns.filter((one) => one !== turn);
  turn.shown.question.remove();
  turn.shown.answer.remove();
  $("question").value = turn.question;
  $("question").focus();
  remember();
}

/** Send what was typed. */
export function send(event) {
  event.preventDefault();
  const question = $("question").value;
  early = model === null;
  if (!question.trim() || stopping !== null || early) return;
  $("question").value = "";
  say(question);
}

export const stop = () => stopping?.abort();

async function say(question) {
  const turn = show({ question, answer: "", note: "", failed: false });
  turns.push(turn);
  const text = turn.shown.answer.querySelector(".text");
  turn.shown.answer.classList.add("pending");
  stopping = new AbortController();
  $("send").disabled = true;
  $("stop").hidden = false;
  $("told").textContent = "";
  update();
  const before = figures().stream, kept = structuredClone(figures());
  try {
    const done = await write(question, stopping.signal, (piece) => {
      const follow = $("scroll").scrollHeight - $("scroll").scrollTop - $("scroll").clientHeight < 60;
      turn.answer += piece;
      text.textContent = turn.answer;
      if (follow) toEnd();
    });
    responses.push(done.id);
    const { stream, usage } = done;
    const sleeps = stream.sleeps - before.sleeps;
    turn.note = `${count(usage.output_tokens, "token")} written${sleeps > 0 ? `, ${count(sleeps, "sleep")}` : ""}`;
    $("told").textContent = `The model answered: ${turn.answer || "nothing"}. ${turn.note}.`;
    showChanged(responses.at(-1)).catch(() => {});
  } catch (error) {
    // The server goes on from the last complete turn, and so do the figures.
    setFigures(kept);
    turn.failed = true;
    const why = error.name === "AbortError" ? "Stopped" : error.message.replace(/\.$/, "");
    turn.note = `${why}. This turn is not part of the conversation.`;
    $("told").textContent = turn.note;
  }
  stopping = null;
  turn.shown.answer.classList.remove("pending");
  if (turns.includes(turn)) note(turn); // else the conversation was begun anew meanwhile
  $("send").disabled = false;
  $("stop").hidden = true;
  remember();
}

/** Have a response written; return it when it is complete. */
async function write(input, signal, piece) {
  const json = {
    model: model.id, input, stream: true, stream_options: { include_state: true },
    temperature: Number($("temperature").value), previous_response_id: responses.at(-1) ?? null,
  };
  if ($("longest").value) json.max_output_tokens = Number($("longest").value);
  const answer = await api("v1/responses", { method: "POST", json, signal });
  try {
    for await (const event of events(answer.body)) {
      if (event.type === "state") happened(event);
      else if (event.type === "response.output_text.delta") piece(event.delta);
      else if (event.type === "error") throw new Error(event.message);
      else if (event.type === "response.completed" || event.type === "response.incomplete") {
        happened(event.response.stream);
        return event.response;
      }
    }
  } catch (error) {
    if (!(error instanceof TypeError)) throw error;
    away(); // so the browser calls a connection that was cut
  }
  throw new Error("The answer broke off.");
}

/** Yield the events of a stream; comments tell what the model does meanwhile. */
async function* events(body) {
  const reader = body.pipeThrough(new TextDecoderStream()).getReader();
  let text = "";
  try {
    for (;;) {
      const { value, done } = await reader.read();
      if (done) return;
      text += value;
      for (let end; (end = text.indexOf("\n\n")) >= 0; text = text.slice(end + 2)) {
        const block = text.slice(0, end);
        // Other comments, such as those that keep a connection open, say nothing to us.
        if (block.startsWith(": {")) yield { ...JSON.parse(block.slice(2)), type: "state" };
        const data = block.split("\n").find((line) => line.startsWith("data: "));
        if (data) yield JSON.parse(data.slice(6));
      }
    }
  } finally {
    reader.cancel().catch(() => {});
  }
}

export const lastResponse = () => responses.at(-1);
