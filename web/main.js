// Shows the text output of LoRA² nodes inside the node. Pictures are shown by ComfyUI itself.
import { app } from "../../scripts/app.js";
import { ComfyWidgets } from "../../scripts/widgets.js";

const TEXT_NODES = new Set(["LoRA2InspectRanks"]);
const WIDGET = "lora2_text";

app.registerExtension({
  name: "comfyui-lora2.text",
  nodeCreated(node) {
    if (!TEXT_NODES.has(node.comfyClass)) return;
    const previous = node.onExecuted;
    node.onExecuted = function (output) {
      previous?.call(this, output);
      const text = output?.text?.join("");
      if (text) showText(this, text);
    };
  },
});

function showText(node, text) {
  const widget = node.widgets?.find((w) => w.name === WIDGET) ?? createTextWidget(node);
  widget.value = text;
  app.canvas?.setDirty(true, true);
}

function createTextWidget(node) {
  const { widget } = ComfyWidgets.STRING(node, WIDGET, ["STRING", { multiline: true }], app);
  // What the node last found out is not a setting: it belongs neither into a saved graph nor
  // into a prompt.
  widget.serialize = false;
  widget.options.serialize = false;
  const box = widget.inputEl ?? widget.element;
  if (box) {
    box.readOnly = true;
    box.setAttribute("aria-label", "Ranks of this LoRA");
    Object.assign(box.style, { fontFamily: "monospace", fontSize: "10px", whiteSpace: "pre" });
  }
  const [width, height] = node.computeSize();
  node.setSize([Math.max(node.size[0], width, 520), Math.max(node.size[1], height + 240)]);
  return widget;
}
