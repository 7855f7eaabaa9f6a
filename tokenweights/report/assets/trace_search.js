// Search over the text of the shown responses; a match may span several tokens.

// White space of any kind, its marks included, is one kind of space.
function searchable(token) {
  const text = token.textContent.replace(/[\s\u21b5\u21e5]/g, " ").toLowerCase();
  return token.firstElementChild?.className === "token-mark" ? text.replaceAll("\u00b7", " ") : text;
}

// The tokens of each match of `query`, in order.
function matches(trace, query) {
  trace.texts ??= trace.tokens.map(searchable);
  const whole = trace.texts.join("");
  const found = [];
  let token = 0;
  let end = trace.texts[0]?.length ?? 0;
  for (let at = whole.indexOf(query); at >= 0; at = whole.indexOf(query, at + query.length)) {
    while (end <= at) end += trace.texts[++token].length;
    const first = token;
    while (end < at + query.length) end += trace.texts[++token].length;
    found.push({ trace, tokens: trace.tokens.slice(first, token + 1) });
    // The next match may start in the same token.
  }
  return found;
}

function activateSearch(section, traces) {
  const box = section.querySelector(".trace-search");
  const input = box.querySelector("input");
  const output = box.querySelector("output");
  let found = [];
  let current = -1;

  function mark(name, match) {
    match?.tokens.forEach((token) => token.classList.add(name));
  }

  function clear(name) {
    section.querySelectorAll(`.${name}`).forEach((token) => token.classList.remove(name));
  }

  function go(to) {
    if (found.length === 0) return;
    current = (to + found.length) % found.length;
    clear("found-now");
    mark("found-now", found[current]);
    found[current].tokens[0].scrollIntoView({ block: "nearest" });
    output.value = `${current + 1} of ${found.length}`;
  }

  function search() {
    const query = input.value.replace(/\s/g, " ").toLowerCase();
    clear("found");
    clear("found-now");
    current = -1;
    const shown = traces.filter((trace) => !trace.article.hidden);
    found = query === "" ? [] : shown.flatMap((trace) => matches(trace, query));
    found.forEach((match) => mark("found", match));
    output.value = query === "" ? "" : found.length === 0 ? "not found" : `${found.length} found`;
  }

  input.addEventListener("input", search);
  input.addEventListener("keydown", (event) => {
    if (event.key !== "Enter") return;
    event.preventDefault();
    go(current < 0 && event.shiftKey ? -1 : current + (event.shiftKey ? -1 : 1));
  });
  section.querySelector(".trace-picker select")?.addEventListener("change", search);
}
