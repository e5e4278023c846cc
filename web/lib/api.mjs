// What the pack's server knows of trainings and LoRA files. Every error is a sentence for people.
import { api } from "../../../scripts/api.js";

const EVENT = "lora2.progress";
const NOTE = "lora2.note";
const PICTURE = /^data:image\/(png|jpeg|webp);base64,/;

/** All trainings, the newest first: short forms without history. */
export async function jobs() {
  return (await overview()).jobs;
}

/** The same, and {count, bytes} of checkpoints that no training needs. */
export async function overview() {
  const { jobs = [], checkpoints = null } = await ask("/lora2/jobs");
  return { jobs, checkpoints };
}

/** Delete those checkpoints; {count, bytes} of what is left. */
export function clearCheckpoints() {
  return ask("/lora2/checkpoints/clear", { method: "POST" });
}

/** One training with its history, components, samples and log. */
export function job(id) {
  return ask(`/lora2/jobs/${encodeURIComponent(id)}`);
}

/** Tell a training to "cancel" (which keeps what was learnt), "pause" or "resume". */
export function post(id, what) {
  return ask(`/lora2/jobs/${encodeURIComponent(id)}/${what}`, { method: "POST" });
}

/** The ranks of a file, named as in the lists of LoRAs. */
export function inspect(name) {
  return ask(`/lora2/inspect?name=${encodeURIComponent(name)}`);
}

/** Call `fn({job, ranks, points, sample})` at every news of a training; returns what ends that. */
export function onProgress(fn) {
  return listen(EVENT, (event) => fn(event.detail));
}

/** Call `fn({node_id, text})` when a node that this page has queued says something. */
export function onNote(fn) {
  return listen(NOTE, (event) => fn(event.detail));
}

/** Call `fn()` whenever the server is back: what happened meanwhile has to be asked for. */
export function onReconnected(fn) {
  return listen("reconnected", () => fn());
}

/** The address of a picture that the server named, as an <img> needs it: of this server, or a picture
 * in itself. Whatever else a file may have had written there becomes a path that is not found. */
export function pictureUrl(path) {
  return PICTURE.test(path) ? path : api.apiURL(path.replace(/^\/api(?=\/)/, ""));
}

/** The picture that sums a finished training up. */
export function reportUrl(id) {
  return pictureUrl(`/lora2/jobs/${encodeURIComponent(id)}/report`);
}

function listen(type, fn) {
  api.addEventListener(type, fn);
  return () => api.removeEventListener(type, fn);
}

async function ask(path, options = {}) {
  const reply = await api.fetchApi(path, { cache: "no-store", ...options });
  const told = await reply.json().catch(() => null);
  if (!reply.ok) {
    const error = new Error(told?.error || `${reply.status} ${reply.statusText}`.trim());
    error.status = reply.status;
    throw error;
  }
  return told ?? {};
}
