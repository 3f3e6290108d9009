// Small helpers for the elements of the page.

export const $ = (id) => document.getElementById(id);

/** Make an element with properties and children; text is never read as markup. */
export function element(tag, properties = {}, ...children) {
  const made = Object.assign(document.createElement(tag), properties);
  made.append(...children);
  return made;
}

/** Say something to readers of screens, once. */
export function announce(text) {
  $("said").textContent = text;
}
