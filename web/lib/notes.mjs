// What ComfyUI's own widgets need for our nodes: small numbers as they are, parts that are not saved,
// and what a node says, as text and never as markup: while it runs, and of its result.
import { app } from "../../../scripts/app.js";
import * as server from "./api.mjs";
import { addPart } from "./part.mjs";
import { make } from "./style.mjs";
import { t } from "./text.mjs";
import { nodeOf } from "./trainings.mjs";

const TEXT_NODES = new Set(["LoRA2InspectRanks"]);
const NOTED_NODES = new Set(["LoRA2ImageFolder"]); // mostly they have nothing to say
const WIDGET = "lora2_text";
const NOTES = "lora2_notes";
const MIN_HEIGHT = 220;

// Nodes 2.0 rounds every number to three decimals, in the field and in the value that is typed:
// a learning rate of 0.00005 would become 0 and then the smallest or largest allowed.
export function showSmallNumbers(node) {
  for (const widget of node.widgets ?? []) {
    if (widget.options?.precision > 3) widget.options.maxFractionDigits = widget.options.precision;
  }
}

// Our own parts are not saved, but leave holes before what is.
export function saveNoHoles(node) {
  const previous = node.onSerialize;
  node.onSerialize = function (saved) {
    previous?.call(this, saved);
    const widgets = this.widgets ?? [];
    saved.widgets_values = saved.widgets_values?.filter(
      (_, place) => widgets[place]?.serialize !== false,
    );
  };
}

const notes = new WeakMap(); // node -> what it says, and the part that holds it

/** Show what nodes of this page say while they run. */
export function watchNotes() {
  server.onNote(({ node_id: path, text }) => {
    const node = nodeOf(path);
    if (node?.comfyClass?.startsWith("LoRA2")) showNote(node, text);
  });
}

function showNote(node, text) {
  if (!text) return dropNote(node);
  if (!notes.has(node)) {
    const content = make("p", "lora2-notes");
    content.dataset.testid = "lora2-notes";
    // A node with little in it stays as narrow as it is, lest it covers its neighbour.
    const width = NOTED_NODES.has(node.comfyClass) ? 0 : undefined;
    notes.set(node, { content, part: addPart(node, NOTES, content, width) });
    const removed = node.onRemoved;
    node.onRemoved = function (...args) {
      removed?.apply(this, args);
      dropNote(this);
    };
  }
  notes.get(node).content.textContent = text;
}

function dropNote(node) {
  notes.get(node)?.part.drop();
  notes.delete(node);
}

/** Show the text that a node like Inspect Ranks found out, inside of it; or what it left out. */
export function showResults(node) {
  const noted = NOTED_NODES.has(node.comfyClass);
  if (!noted && !TEXT_NODES.has(node.comfyClass)) return;
  const previous = node.onExecuted;
  node.onExecuted = function (output) {
    previous?.call(this, output);
    const text = output?.text?.join("");
    if (noted) showNote(this, text);
    else if (text) showText(this, text);
  };
}

function showText(node, text) {
  const widget = node.widgets?.find((w) => w.name === WIDGET) ?? createTextWidget(node);
  widget.element.firstChild.textContent = text;
  app.canvas?.setDirty(true, true);
}

function createTextWidget(node) {
  // The text lies absolutely in its frame: in Nodes 2.0 a node grows with what it contains, and
  // this one should scroll instead.
  const text = make("pre");
  const frame = make("div", "", text);
  Object.assign(frame.style, {
    position: "relative",
    height: "100%",
    minHeight: `${MIN_HEIGHT}px`,
  });
  text.tabIndex = 0; // to scroll with the keyboard
  text.setAttribute("role", "region");
  text.setAttribute("aria-label", t("inspect_text"));
  Object.assign(text.style, {
    position: "absolute",
    inset: "0",
    margin: "0",
    padding: "6px 8px",
    overflow: "auto",
    font: "11px/1.35 ui-monospace, Menlo, Consolas, monospace",
    color: "var(--input-text)",
    background: "var(--comfy-input-bg)",
    borderRadius: "6px",
    userSelect: "text",
  });
  // What the node last found out is not a setting: it belongs neither into a saved graph nor
  // into a prompt.
  const widget = node.addDOMWidget(WIDGET, "lora2_text", frame, {
    serialize: false,
    getMinHeight: () => MIN_HEIGHT,
  });
  widget.serialize = false;
  const [width, height] = node.computeSize();
  node.setSize([Math.max(node.size[0], width, 520), Math.max(node.size[1], height)]);
  return widget;
}
