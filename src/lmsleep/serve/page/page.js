// The page speaks to the same API as everybody else, at the address that it came from.

import { $, askForKey, get, hasKey, onBack, onNewKey } from "./api.js";
import { merge, showMemories, take } from "./memories.js";
import { count, setModel, showChanged } from "./sleep.js";
import { anew, beginTalk, lastResponse, restore, send, stop } from "./talk.js";

async function begin() {
  const [model] = (await get("v1/models")).data;
  const sleeps = model.window === null ? "never sleeps" : `window of ${count(model.window, "token")}, ${count(model.passes, "pass", "passes")} a sleep`;
  $("model").textContent = `${model.id}: ${sleeps}`;
  $("change-key").hidden = !hasKey();
  setModel(model);
  beginTalk(model);
  await showMemories();
}

const tryToBegin = () => begin().catch((error) => { $("model").textContent = error.message; });

$("ask").addEventListener("submit", send);
$("question").addEventListener("keydown", (event) => {
  // Not while an input method composes: Enter then takes what it suggests.
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) { event.preventDefault(); $("ask").requestSubmit(); }
});
$("stop").addEventListener("click", stop);
$("anew").addEventListener("click", async () => { $("question").focus(); await anew(); });
$("changed").addEventListener("toggle", () => showChanged(lastResponse()).catch((error) => { $("heads").textContent = error.message; }));
$("merge").addEventListener("click", merge);
$("choose").addEventListener("click", () => $("file").click());
$("file").addEventListener("change", async () => { await take([...$("file").files]); $("file").value = ""; });
$("change-key").addEventListener("click", () => askForKey().then(tryToBegin, () => {}));
onBack(tryToBegin);
// Another key is another user, who must see nothing of the one before.
onNewKey(() => anew({ here: true }));

// Files may be dropped anywhere on the page.
const carriesFiles = (event) => event.dataTransfer?.types.includes("Files");
for (const name of ["dragover", "dragleave", "drop"]) {
  document.addEventListener(name, (event) => {
    if (!carriesFiles(event)) return;
    event.preventDefault();
    document.body.classList.toggle("over", name === "dragover");
    if (name === "drop") take([...event.dataTransfer.files]);
  });
}

restore();
tryToBegin();
