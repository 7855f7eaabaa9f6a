"use strict";

// One tooltip serves all traces. It is filled with text nodes only, never with HTML.
const tooltip = document.createElement("div");
tooltip.id = "token-tooltip";
tooltip.className = "token-tooltip";
tooltip.setAttribute("role", "tooltip");
tooltip.hidden = true;
document.body.append(tooltip);

function element(name, text) {
  const made = document.createElement(name);
  made.textContent = text;
  return made;
}

function tokenText(token) {
  return token.textContent.replaceAll("\u00a0", "\u00b7").replaceAll("\n", "\u21b5");
}

function show(token, position, data) {
  const list = document.createElement("dl");
  const row = (label, value) => list.append(element("dt", label), element("dd", value));
  row("position", `${position + 1} of ${data.length}`);
  for (const column of data.columns) {
    const value = column.values[position];
    const shown = typeof value !== "number" || Number.isInteger(value) ? value : value.toPrecision(3);
    row(column.label, `${shown} ${column.unit}`.replace("-", "\u2212"));
  }
  tooltip.replaceChildren(element("strong", tokenText(token)), list);
  tooltip.hidden = false;
  const gap = 8;
  // A token that wraps has several boxes; the tooltip goes to the last.
  const boxes = token.getClientRects();
  const box = boxes[boxes.length - 1];
  // Never over the token itself, nor over the strip that shows its attention.
  const strip = document.querySelector(".trace-strip:not([hidden])");
  const floor = Math.min(innerHeight, strip ? strip.getBoundingClientRect().top : innerHeight);
  const below = box.bottom + gap;
  const room = { below: floor - below - gap, above: box.top - 2 * gap };
  tooltip.style.maxHeight = "none";
  const fits = tooltip.offsetHeight <= room.below || room.below >= room.above;
  tooltip.style.maxHeight = `${Math.max(fits ? room.below : room.above, 0)}px`;
  const left = Math.min(box.left, innerWidth - tooltip.offsetWidth - gap);
  tooltip.style.left = `${Math.max(gap, left)}px`;
  tooltip.style.top = `${Math.max(gap, fits ? below : box.top - gap - tooltip.offsetHeight)}px`;
}

let described = null;

function describe(token, position, data) {
  described = () => show(token, position, data);
  described();
}

function hide() {
  described = null;
  tooltip.hidden = true;
}

// The token on the nearest line above (direction -1) or below (1) that is closest sideways.
function vertical(tokens, from, direction) {
  const start = tokens[from].getBoundingClientRect();
  let best = from;
  let bestLine = null;
  let bestDistance = Infinity;
  for (let i = from + direction; i >= 0 && i < tokens.length; i += direction) {
    const box = tokens[i].getBoundingClientRect();
    if (Math.abs(box.top - start.top) < 2) continue;
    if (bestLine === null) bestLine = box.top;
    if (Math.abs(box.top - bestLine) >= 2) break;
    const distance = Math.abs(box.left - start.left);
    if (distance < bestDistance) [best, bestDistance] = [i, distance];
  }
  return best;
}

function activate(article) {
  const section = article.closest(".traces");
  const container = article.querySelector(".trace-tokens");
  const data = JSON.parse(article.querySelector(".trace-data").textContent);
  const tokens = [...container.querySelectorAll(".token")];
  const positions = new Map(tokens.map((token, position) => [token, position]));
  const filter = section.querySelector(".trace-filter");
  const trace = { article, section, data, tokens, select };
  if (tokens.length === 0) return trace;

  // One token at a time is in the tab order; the arrow keys move it.
  let current = tokens[0];
  current.tabIndex = 0;

  function select(token) {
    current.tabIndex = -1;
    current.removeAttribute("aria-describedby");
    current = token;
    current.tabIndex = 0;
    current.setAttribute("aria-describedby", tooltip.id);
    current.focus();
  }

  function shown() {
    const group = filter?.querySelector("input:checked").value ?? "all";
    return group === "all" ? tokens : tokens.filter((token) => token.dataset.group === group);
  }

  container.addEventListener("keydown", (event) => {
    if (event.altKey || event.ctrlKey || event.metaKey) return;
    if (event.key === "Escape") {
      hide();
      closeStrip(section);
      return;
    }
    if (event.key === "Enter" || event.key === " ") {
      event.preventDefault();
      showStrip(trace, positions.get(current));
      return;
    }
    const visible = shown();
    if (visible.length === 0) return;
    // With a filter on, a hidden token may be current: then the next shown one counts as its place.
    const place = positions.get(current);
    let at = visible.findIndex((token) => positions.get(token) >= place);
    if (at < 0) at = visible.length;
    const onShown = visible[at] === current;
    const targets = {
      ArrowRight: onShown ? at + 1 : at,
      ArrowLeft: at - 1,
      Home: 0,
      End: visible.length - 1,
    };
    if (event.key === "ArrowDown" || event.key === "ArrowUp") {
      const direction = event.key === "ArrowDown" ? 1 : -1;
      targets[event.key] = onShown ? vertical(visible, at, direction) : at;
    }
    if (!(event.key in targets)) return;
    event.preventDefault();
    select(visible[Math.min(Math.max(targets[event.key], 0), visible.length - 1)]);
  });

  const tokenOf = (event) => event.target.closest?.(".token");
  const enter = (event) => {
    const token = tokenOf(event);
    if (token) describe(token, positions.get(token), data);
  };
  container.addEventListener("focusin", enter);
  container.addEventListener("mouseover", enter);
  container.addEventListener("focusout", hide);
  container.addEventListener("mouseout", hide);
  container.addEventListener("click", (event) => {
    const token = tokenOf(event);
    if (!token) return;
    select(token);
    showStrip(trace, positions.get(token));
  });
  return trace;
}

function activatePicker(section, traces) {
  const picker = section.querySelector(".trace-picker select");
  const choose = () =>
    traces.forEach((trace, number) => {
      trace.article.hidden = picker.value !== "all" && picker.value !== String(number);
    });
  picker?.addEventListener("change", choose);
  // A browser may restore the choice of an earlier visit.
  if (picker) choose();
}

addEventListener("DOMContentLoaded", () => {
  for (const section of document.querySelectorAll(".traces")) {
    const traces = [...section.querySelectorAll(".trace")].map(activate);
    activatePicker(section, traces);
    activateSearch(section, traces);
    activateStrip(section);
  }
});
// The tooltip is fixed to the window, so it follows its token when the page scrolls.
addEventListener("scroll", () => described?.(), { passive: true });
