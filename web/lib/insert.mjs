// Adds a node that loads a LoRA to the graph that is on the screen.
import { define, t } from "./text.mjs";

const NODE = "LoRA2Load";
const GAP = 40;
const OFF = new Set([2, 4]); // muted and bypassed

define({
  insert_no_node: "ComfyUI does not know the node Load Variable-Rank LoRA; reload the page.",
  insert_no_file: "{file} is no longer among the LoRAs.",
});

/** Add a loader of `file`, after the model it fits if that is clear; tells whether it was. */
export async function insertLoader(app, file) {
  const node = await createLoader(app, file);
  const { canvas } = app;
  const graph = canvas.graph ?? app.graph; // the subgraph that is open, if one is
  const source = findSource(canvas, graph);
  canvas.emitBeforeChange?.(); // both ends make it one step for undo
  try {
    node.pos = place(canvas, graph, node, source?.node);
    addAsIs(graph, node);
    source?.node.connect(source.slot, node, node.findInputSlot("model"));
  } finally {
    canvas.emitAfterChange?.();
  }
  show(canvas, node);
  return { node, connected: Boolean(source) };
}

/** Newer front ends give an added node the values of an earlier one of its number, now gone. */
function addAsIs(graph, node) {
  const values = node.widgets.map((widget) => widget.value);
  graph.add(node);
  for (const [place, widget] of node.widgets.entries()) {
    if (widget.value !== values[place]) widget.value = values[place];
  }
}

async function createLoader(app, file) {
  let node = offering(file);
  if (!node) {
    await app.refreshComboInNodes(); // the file may be newer than the lists
    node = offering(file);
  }
  if (!node) throw new Error(t("insert_no_file", { file }));
  return node;
}

/** A loader set to `file`; nothing if that is not in its list. */
function offering(file) {
  const node = window.LiteGraph.createNode(NODE);
  const widget = node?.widgets?.find(({ name }) => name === "lora_name");
  if (!widget) throw new Error(t("insert_no_node"));
  if (!widget.options.values?.includes(file)) return null;
  widget.value = file;
  return node;
}

/** A selected node that gives a model, or else the only one in which a model begins. */
function findSource(canvas, graph) {
  const selected = Object.values(canvas.selected_nodes ?? {}).filter((node) => slotOf(node) >= 0);
  const begins = (node) => !node.inputs?.some(({ type }) => type === "MODEL");
  const all = graph.nodes.filter((node) => slotOf(node) >= 0 && begins(node));
  const on = all.filter(({ mode }) => !OFF.has(mode));
  const node = selected[0] ?? (on.length === 1 ? on[0] : null);
  return node && { node, slot: slotOf(node) };
}

function slotOf(node) {
  return node.outputs?.findIndex(({ type }) => type === "MODEL") ?? -1;
}

/** Right of its source, or in the middle of the screen, and lower where nodes are in the way. */
function place(canvas, graph, node, source) {
  const [left, top, width, height] = canvas.visible_area;
  const [wide, high] = node.size;
  const x = source ? source.pos[0] + source.size[0] + GAP : left + (width - wide) / 2;
  let y = source ? source.pos[1] : top + (height - high) / 2;
  const title = window.LiteGraph.NODE_TITLE_HEIGHT;
  const blocks = (other) =>
    other.pos[0] < x + wide + GAP / 2 &&
    other.pos[0] + other.size[0] + GAP / 2 > x &&
    other.pos[1] - title < y + high + GAP / 2 &&
    other.pos[1] + other.size[1] + GAP / 2 > y - title;
  for (let other; (other = graph.nodes.find(blocks)); ) {
    y = other.pos[1] + other.size[1] + title + GAP;
  }
  return [x, y];
}

function show(canvas, node) {
  canvas.deselectAll?.();
  canvas.select?.(node);
  const [left, top, width, height] = canvas.visible_area;
  const [x, y] = node.pos; // its bounds are measured when it is drawn
  const [wide, high] = node.size;
  const beside = sideBarWidth() / canvas.ds.scale; // the side bar lies over the canvas
  const inside =
    x >= left + beside &&
    y >= top + GAP &&
    x + wide <= left + width &&
    y + high + GAP <= top + height;
  if (!inside) canvas.centerOnNode(node);
  canvas.setDirty(true, true);
}

function sideBarWidth() {
  return document.querySelector(".side-bar-panel")?.getBoundingClientRect().right ?? 0;
}
