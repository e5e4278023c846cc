// What the LoRA² nodes are in the browser: each training in its node, every file's ranks, and the
// LoRA² tab. Pictures that come out of nodes are shown by ComfyUI itself.
import { app } from "../../scripts/app.js";
import { inspectIn } from "./lib/inspection.mjs";
import { listsAsText } from "./lib/lists.mjs";
import { saveNoHoles, showResults, showSmallNumbers, watchNotes } from "./lib/notes.mjs";
import { registerSidebar } from "./lib/sidebar.mjs";
import { ready } from "./lib/text.mjs";
import { adopt, watchTrainings } from "./lib/trainings.mjs";

app.registerExtension({
  name: "comfyui-lora2",
  async setup() {
    await ready; // the words of this language, before any is shown
    listsAsText();
    registerSidebar(app);
    watchNotes();
    watchTrainings();
  },
  nodeCreated(node) {
    if (!node.comfyClass?.startsWith("LoRA2")) return;
    showSmallNumbers(node);
    saveNoHoles(node);
    showResults(node);
    inspectIn(node);
    adopt(node);
  },
});
