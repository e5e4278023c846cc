// Below the trainings: what those that were stopped have left on the disk, and one click to delete it.
import { make, put } from "./sidebar_style.mjs";
import { bytes, define, number, t } from "./text.mjs";

define({
  leftovers_one: "1 checkpoint of a stopped training, {size}",
  leftovers_many: "{count} checkpoints of stopped trainings, {size}",
  leftovers_delete: "Delete",
  leftovers_hint:
    "Run again, a stopped training goes on from its checkpoint. Without it, it begins anew; its " +
    "LoRA stays. The newest 10 are kept, for 30 days.",
});

export class Leftovers {
  root = make("div", "lora2-side-leftovers", { hidden: true });
  #text = make("span");
  #button = make("button", "lora2-side-button", { type: "button" });

  constructor(clear) {
    this.root.dataset.testid = "lora2-checkpoints";
    this.root.append(this.#text, this.#button);
    this.#button.onclick = async () => {
      this.#button.disabled = true; // a second click would find nothing
      await clear();
      this.#button.disabled = false;
    };
  }

  /** `checkpoints`: {count, bytes}, or null where that is not known. */
  draw(checkpoints) {
    const { count = 0, bytes: size = 0 } = checkpoints ?? {};
    this.root.hidden = !count;
    if (!count) return;
    const key = count === 1 ? "leftovers_one" : "leftovers_many";
    put(this.#text, t(key, { count: number(count), size: bytes(size) }));
    put(this.#button, t("leftovers_delete"));
    this.root.title = t("leftovers_hint");
  }
}
