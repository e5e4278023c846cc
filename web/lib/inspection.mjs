// The ranks of the file that is chosen in an Inspect Ranks node, as soon as it is chosen.
import * as server from "./api.mjs";
import { HeatMap } from "./heatmap.mjs";
import { addPart } from "./part.mjs";
import { make } from "./style.mjs";
import { bytes, number, t } from "./text.mjs";

export const MAP = "lora2_map";
const NODE = "LoRA2InspectRanks";

/** Show the heat map in a node of this kind whenever its file changes. */
export function inspectIn(node) {
  const widget = node.widgets?.find(({ name }) => name === "lora_name");
  if (node.comfyClass !== NODE || !widget) return;
  const view = new Inspection(node);
  after(widget, "callback", () => view.show(widget.value));
  after(node, "onConfigure", () => view.show(widget.value));
  after(node, "onExecuted", () => view.show(widget.value));
  after(node, "onRemoved", () => view.close());
}

function after(owner, name, act) {
  const previous = owner[name];
  owner[name] = function (...args) {
    const result = previous?.apply(this, args);
    act();
    return result;
  };
}

class Inspection {
  constructor(node) {
    this.node = node;
    this.name = null;
    this.map = null;
  }

  async show(name) {
    this.name = name;
    // The first entry stands for the socket: what comes out of it is known when the node runs.
    if (typeof name !== "string" || !name || name.startsWith("(")) return this.close();
    try {
      const told = await server.inspect(name);
      if (this.name === name) this.take(told);
    } catch (error) {
      console.warn(`LoRA²: no ranks of ${name}:`, error);
      if (this.name === name) this.close(); // the node itself says what is wrong once it runs
    }
  }

  take(told) {
    if (!told.components?.length) return this.close();
    if (!this.map) this.open();
    const kinds = Object.entries(told.kinds ?? {}).map(([kind, count]) => `${count} ${kind}`);
    const ranks = told.mean_rank === null ? [] : [`${t("mean_rank")} ${number(told.mean_rank, 1)}`];
    const facts = [...ranks, ...(kinds.length > 1 || !ranks.length ? kinds : []), bytes(told.bytes)];
    if (told.trigger) facts.push(`“${told.trigger}”`);
    this.line.textContent = this.line.title = facts.join(" · ");
    this.map.set(told.components);
    this.#picture(told);
  }

  /** The picture that the file holds, if any. */
  #picture({ thumbnail, name }) {
    this.thumb.hidden = !thumbnail;
    if (!thumbnail) return;
    this.thumb.src = server.pictureUrl(thumbnail);
    this.thumb.alt = t("card_picture_of", { name });
  }

  open() {
    this.line = make("div", "lora2-name");
    const host = make("div");
    this.thumb = make("img", "lora2-thumb");
    this.thumb.hidden = true;
    const head = make("div", "lora2-head", this.line, this.thumb);
    const content = make("section", "lora2-panel", head, host);
    this.map = new HeatMap(host, { label: t("heatmap_label") });
    this.part = addPart(this.node, MAP, content);
  }

  close() {
    this.map?.destroy();
    this.part?.drop();
    this.map = this.part = null;
  }
}
