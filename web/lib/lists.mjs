// The names in a list, as text: up to front end 1.32 the classic canvas puts what a list offers into
// the page as markup, and a LoRA somebody sent may be called <img src=x onerror=…>.safetensors.

/** Let menus show their entries of plain text as later front ends do; to be called once. */
export function listsAsText() {
  const menu = window.LiteGraph?.ContextMenu?.prototype;
  if (!menu?.addItem) return; // a front end without these menus
  const addItem = menu.addItem;
  menu.addItem = function (name, value, options) {
    if (typeof value !== "string") return addItem.call(this, name, value, options);
    const element = addItem.call(this, "", value, options);
    element.textContent = name ?? "";
    return element;
  };
}
