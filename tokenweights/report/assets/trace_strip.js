// What a chosen token attended to: a strip over its context, and marks on the attended tokens.

function unpacked(text, kind) {
  const bytes = Uint8Array.from(atob(text), (character) => character.charCodeAt(0));
  return new kind(bytes.buffer); // little-endian, as every browser's machine is
}

// The recorded row of a token: pairs of place and weight, largest first, and its context's size.
function attentionRow(trace, position) {
  const packed = trace.data.attention;
  if (!packed) return null;
  trace.attention ??= {
    counts: unpacked(packed.counts, Uint32Array),
    places: unpacked(packed.places, packed.wide ? Uint32Array : Uint16Array),
    weights: unpacked(packed.weights, Uint16Array),
  };
  const { counts, places, weights } = trace.attention;
  let start = 0;
  for (let row = 0; row < position; row += 1) start += counts[row];
  const pairs = [];
  for (let i = start; i < start + counts[position]; i += 1) {
    pairs.push({ place: places[i], weight: weights[i] / 65535 });
  }
  pairs.sort((first, second) => second.weight - first.weight);
  return { pairs, prompt: packed.prompt, size: packed.prompt + position + (packed.own ? 1 : 0) };
}

// What the recorded rows of other tokens give to a token: the same pairs, by who looks.
function receivedRow(trace, position) {
  if (!attentionRow(trace, position)) return null;
  if (!trace.received) {
    trace.received = trace.tokens.map(() => []);
    const { counts, places, weights } = trace.attention;
    const { prompt } = trace.data.attention;
    let at = 0;
    counts.forEach((count, token) => {
      for (const end = at + count; at < end; at += 1) {
        if (places[at] < prompt || places[at] === prompt + token) continue;
        const weight = weights[at] / 65535;
        trace.received[places[at] - prompt].push({ place: prompt + token, weight });
      }
    });
    trace.received.forEach((pairs) => pairs.sort((first, second) => second.weight - first.weight));
  }
  const { prompt } = trace.data.attention;
  return { pairs: trace.received[position], prompt, size: prompt + trace.tokens.length };
}

// The elements of prompt and response, by place; the prompt may stand above all responses.
function contextOf(trace) {
  const prompt =
    trace.article.querySelector(".trace-prompt") ?? trace.section.querySelector(".trace-prompt");
  trace.context ??= [...(prompt?.querySelectorAll(".context") ?? []), ...trace.tokens];
  return trace.context;
}

function percent(share) {
  return `${(100 * share).toFixed(share < 0.0995 ? 1 : 0)} %`;
}

function drawStrip(canvas, row) {
  const scale = devicePixelRatio;
  canvas.width = canvas.clientWidth * scale;
  canvas.height = canvas.clientHeight * scale;
  const pen = canvas.getContext("2d");
  const style = getComputedStyle(canvas);
  const column = canvas.width / row.size;
  const largest = row.pairs[0]?.weight || 1;
  if (row.prompt > 0) {
    pen.fillStyle = style.getPropertyValue("--raised");
    pen.fillRect(0, 0, row.prompt * column, canvas.height);
  }
  pen.fillStyle = style.getPropertyValue("--second");
  for (const { place, weight } of row.pairs) {
    const height = Math.max((canvas.height * weight) / largest, weight > 0 ? scale : 0);
    const width = Math.max(column - (column > 4 * scale ? scale : 0), scale);
    pen.fillRect(place * column, canvas.height - height, width, height);
  }
}

function unmark(section) {
  section.querySelectorAll(".attended, .chosen").forEach((token) => {
    token.classList.remove("attended", "chosen");
    token.style.removeProperty("--a");
  });
}

function closeStrip(section) {
  const strip = section.querySelector(".trace-strip");
  if (!strip || strip.hidden) return;
  strip.hidden = true;
  unmark(section);
}

function showStrip(trace, position) {
  const strip = trace.section.querySelector(".trace-strip");
  if (!strip) return;
  unmark(trace.section);
  const turn = strip.querySelector(".trace-turn");
  const back = turn.getAttribute("aria-pressed") === "true";
  const row = back ? receivedRow(trace, position) : attentionRow(trace, position);
  turn.onclick = () => {
    turn.setAttribute("aria-pressed", String(!back));
    showStrip(trace, position);
  };
  strip.querySelector(".trace-end").textContent = back ? "last token" : "chosen token";
  const text = `\u201c${tokenText(trace.tokens[position])}\u201d`;
  const say = strip.querySelector("p");
  const largest = strip.querySelector(".trace-largest");
  strip.hidden = false;
  strip.classList.toggle("empty", !row);
  strip.draw = () => row && drawStrip(strip.querySelector("canvas"), row);
  largest.replaceChildren();
  if (!row) {
    say.textContent = `The attention of ${text} was not recorded.`;
    return;
  }
  const context = contextOf(trace);
  const mass = row.pairs.reduce((sum, { weight }) => sum + weight, 0);
  const all = row.pairs.length >= row.size ? "all of them" : `${row.pairs.length} recorded`;
  const later = trace.tokens.length - position - 1;
  say.textContent = back
    ? `${text}, position ${position + 1}: ${row.pairs.length} of ${later} later tokens look back ` +
      `at it among their recorded weights, and give it ${mass.toFixed(2)} in sum.`
    : `${text}, position ${position + 1}, looks at ${row.size} tokens; ` +
      `${all}, with ${percent(mass)} of its attention.`;
  strip.querySelector("output").value = `highest bar ${percent(row.pairs[0]?.weight ?? 0)}`;
  trace.tokens[position].classList.add("chosen");
  for (const { place, weight } of row.pairs) {
    context[place]?.classList.add("attended");
    context[place]?.style.setProperty("--a", (weight / row.pairs[0].weight).toFixed(3));
  }
  for (const { place, weight } of row.pairs.slice(0, 8)) {
    const button = element("button", `${tokenText(context[place])} `);
    button.type = "button";
    button.append(element("small", percent(weight)));
    const where = place < row.prompt ? "prompt token" : "response token";
    button.title = `${where} ${1 + (place < row.prompt ? place : place - row.prompt)}`;
    button.addEventListener("click", () => context[place].scrollIntoView({ block: "center" }));
    largest.append(button);
  }
  strip.draw();
  // The strip may have come to lie over the token, or over the tooltip.
  trace.tokens[position].scrollIntoView({ block: "nearest" });
  described?.();
}

function activateStrip(section) {
  const strip = section.querySelector(".trace-strip");
  if (!strip) return;
  strip.querySelector(".trace-close").addEventListener("click", () => closeStrip(section));
  strip.addEventListener("keydown", (event) => {
    if (event.key === "Escape") closeStrip(section);
  });
  const redraw = () => !strip.hidden && strip.draw?.();
  addEventListener("resize", redraw);
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", redraw);
  section
    .querySelector(".trace-picker select")
    ?.addEventListener("change", () => closeStrip(section));
}
