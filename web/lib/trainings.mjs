// Which training is shown in which node: the newest that was started from it.
import { app } from "../../../scripts/app.js";
import * as server from "./api.mjs";
import { Panel } from "./panel.mjs";
import { addPart } from "./part.mjs";

export const PANEL = "lora2_panel";
const NODE = "LoRA2Train";

const jobs = new Map(); // short forms by id
const nodes = new Set();
const shown = new Map(); // node -> its panel and the part of the node that holds it
let frame = 0;

/** Begin to listen; a node made before or after is served alike. */
export function watchTrainings() {
  server.onProgress(hear);
  server.onReconnected(ask);
  return ask();
}

/** Take care of a node as long as it lives. */
export function adopt(node) {
  if (node.comfyClass !== NODE) return;
  nodes.add(node);
  const removed = node.onRemoved;
  node.onRemoved = function (...args) {
    removed?.apply(this, args);
    forget(this);
  };
  const added = node.onAdded; // a node that is undone and redone comes back
  node.onAdded = function (...args) {
    added?.apply(this, args);
    nodes.add(this);
    assignSoon();
  };
  assignSoon();
}

async function ask() {
  try {
    for (const job of await server.jobs()) jobs.set(job.id, job);
  } catch (error) {
    console.warn("LoRA²: the trainings are not known:", error);
    return;
  }
  for (const { panel } of shown.values()) {
    if (jobs.has(panel.id)) panel.follow(jobs.get(panel.id));
  }
  assign();
}

function hear(news) {
  const { job } = news;
  const fresh = !jobs.has(job.id);
  jobs.set(job.id, job);
  for (const { panel } of shown.values()) if (panel.id === job.id) panel.hear(news);
  if (fresh) assign();
}

/** Nodes get their number and their graph after they are made. */
function assignSoon() {
  frame ||= requestAnimationFrame(() => {
    frame = 0;
    assign();
  });
}

function assign() {
  for (const node of nodes) {
    const job = newest(node);
    const panel = shown.get(node)?.panel;
    if (!job || panel?.id === job.id) continue;
    (panel ?? open(node)).follow(job);
  }
}

function newest(node) {
  const own = shown.get(node)?.panel.id;
  let found = null;
  for (const job of jobs.values()) {
    const fits = nodeOf(job.node_id) === node && (job.id === own || named(node, job));
    if (fits && (!found || job.created > found.created)) found = job;
  }
  return found;
}

/** The node of a prompt's number: "12", or "5:12" for the 12 inside of the subgraph 5. */
export function nodeOf(path) {
  if (!path) return null;
  const parts = String(path).split(":");
  let graph = app.rootGraph ?? app.graph?.rootGraph ?? app.graph;
  for (const part of parts.slice(0, -1)) graph = graph?.getNodeById(part)?.subgraph;
  return graph?.getNodeById(parts.at(-1)) ?? null;
}

/** Whether the file could be this node's: other workflows have nodes of the same number. */
function named(node, job) {
  const value = node.widgets?.find((widget) => widget.name === "file_name")?.value;
  if (typeof value !== "string" || value.includes("%")) return true;
  const slot = node.findInputSlot("file_name");
  const linked = slot >= 0 && node.isInputConnected(slot);
  const stem = value.replace(/\.(safetensors|sft)$/i, "").split(/[\\/]/).at(-1).trim();
  return linked || !job.name || job.name.startsWith(stem);
}

function open(node) {
  const panel = new Panel();
  shown.set(node, { panel, part: addPart(node, PANEL, panel.element) });
  return panel;
}

function forget(node) {
  nodes.delete(node);
  const { panel, part } = shown.get(node) ?? {};
  shown.delete(node);
  panel?.destroy();
  part?.drop();
}
