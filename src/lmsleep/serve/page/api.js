// Requests to the server that the page came from; the key that it may ask for; waiting while it is away.

const KEY = "lmsleep.key";
export const $ = (name) => document.getElementById(name);

let key = sessionStorage.getItem(KEY) ?? "";
let asking = null; // the promise of a key: however many requests are refused, one dialog is open
let waiting = null; // the promise that the server is back
const listeners = { back: [], key: [] };

export const onBack = (listener) => listeners.back.push(listener);
export const onNewKey = (listener) => listeners.key.push(listener);

/** Fetch a path of the server; throws an Error whose message can be shown. */
export async function api(path, { json, headers = {}, ...options } = {}) {
  const used = key;
  const how = { ...options, headers: { ...headers } };
  if (used) how.headers.Authorization = `Bearer ${used}`;
  if (json !== undefined) {
    how.headers["Content-Type"] = "application/json";
    how.body = JSON.stringify(json);
  }
  let answer;
  try {
    answer = await fetch(path, how);
  } catch (error) {
    if (error.name === "AbortError") throw error;
    away();
    throw new Error("The server cannot be reached.");
  }
  if (answer.status === 401) {
    // Another request may have brought a new key meanwhile.
    if (used === key) await askForKey(used ? "This key is not known here." : "");
    return api(path, { json, headers, ...options });
  }
  if (!answer.ok) {
    const said = await answer.json().catch(() => null);
    throw new Error(said?.error?.message ?? `The server answered ${answer.status}.`);
  }
  return answer;
}

export const get = async (path) => (await api(path)).json();
export const post = async (path, json = {}) => (await api(path, { method: "POST", json })).json();
export const drop = async (path) => (await api(path, { method: "DELETE" })).json();

/** Ask for a key until one is given; another one than before means another user. */
export function askForKey(error = "") {
  asking ??= new Promise((resolve, reject) => {
    const dialog = $("key"), form = dialog.querySelector("form"), field = $("key-text");
    field.value = "";
    $("key-error").textContent = error;
    form.onsubmit = (event) => { event.preventDefault(); dialog.close(field.value.trim()); };
    dialog.returnValue = "";
    dialog.onclose = () => {
      asking = null;
      $("change-key").hidden = false;
      if (!dialog.returnValue) return reject(new Error("This server asks for a key."));
      const changed = key !== "" && key !== dialog.returnValue;
      key = dialog.returnValue;
      sessionStorage.setItem(KEY, key);
      field.value = "";
      if (changed) for (const listener of listeners.key) listener();
      return resolve();
    };
    dialog.showModal();
  });
  return asking;
}

export const hasKey = () => key !== "";

/** Wait until the server is there again, and say so meanwhile; what it was told is on its disk. */
export function away() {
  waiting ??= (async () => {
    $("connection").textContent = "The server cannot be reached. Trying again …";
    $("connection").hidden = false;
    do await new Promise((resolve) => setTimeout(resolve, 1000));
    while (!(await fetch("ready").catch(() => null))?.ok);
    $("connection").hidden = true;
    waiting = null;
    for (const listener of listeners.back) listener();
  })();
  return waiting;
}
