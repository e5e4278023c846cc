// A part of a node that is no setting of it: neither saved with the graph nor sent with a prompt.
import { addStyle, make } from "./style.mjs";

const LEAST_WIDTH = 420;
const MARGIN = 20; // what the classic canvas leaves around an element, above and below together

const states = new WeakMap(); // node -> its height without parts, and the height of each part

/** Show `content` in `node` at the height that it has, and in a node of at least this width; returns
 *  {drop()}, which takes it out. */
export function addPart(node, name, content, leastWidth = LEAST_WIDTH) {
  addStyle();
  const frame = make("div", "lora2-frame", content);
  const state = stateOf(node);
  state.leastWidth = Math.max(state.leastWidth, leastWidth);
  const spare = () => Math.max(0, node.size[1] - state.before);
  let height = 0;
  state.heights.set(frame, 0);
  const widget = node.addDOMWidget(name, name, frame, {
    serialize: false,
    getMinHeight: () => height + MARGIN,
    getMaxHeight: () => height + MARGIN,
  });
  widget.serialize = false;
  const watch = new ResizeObserver(() => {
    const now = content.offsetHeight; // 0 while the node is collapsed or out of sight
    if (!now || now === height) return;
    const less = Math.max(0, height - now);
    height = now;
    state.heights.set(frame, height + MARGIN);
    fit(node, Math.min(less, spare()));
  });
  watch.observe(content);
  fit(node);
  const drop = () => {
    watch.disconnect();
    state.heights.delete(frame);
    if (!node.widgets?.includes(widget)) return; // the node itself is gone
    node.removeWidget(widget);
    fit(node, Math.min(height + MARGIN, spare()));
  };
  return { drop };
}

function stateOf(node) {
  if (!states.has(node)) {
    states.set(node, { before: node.size[1], heights: new Map(), leastWidth: 0 });
    saveNoHeight(node, states.get(node));
  }
  const state = states.get(node);
  if (!state.heights.size) state.before = node.size[1]; // what it needs without parts, or more
  return state;
}

/** Take `less` from a node's height, and make it as large as what it holds needs. */
function fit(node, less = 0) {
  const [width, height] = node.computeSize();
  const least = Math.max(width, states.get(node).leastWidth);
  const size = [Math.max(node.size[0], least), Math.max(node.size[1] - less, height)];
  if (size[0] !== node.size[0] || size[1] !== node.size[1]) node.setSize(size);
  node.graph?.setDirtyCanvas(true, true);
}

/** A graph that is opened again has no parts yet, and their place would be empty. */
function saveNoHeight(node, state) {
  const previous = node.onSerialize;
  node.onSerialize = function (saved) {
    previous?.call(this, saved);
    const [width, high] = saved.size ?? [0, 0];
    const taken = [...state.heights.values()].reduce((sum, height) => sum + height, 0);
    if (high) saved.size = [width, high - Math.min(taken, Math.max(0, high - state.before))];
  };
}
