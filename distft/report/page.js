"use strict";
// The hand-lens: under the pointer, or moved with the arrow keys, what each line says there.
for (const plot of document.querySelectorAll(".plot[data-lens]")) {
  const svg = plot.querySelector("svg"), out = plot.nextElementSibling;
  const { frame: [left, right, top, bottom], span: [low, high], over, lines } = JSON.parse(plot.dataset.lens);
  const places = [...new Set(lines.flatMap((line) => line.x))].sort((a, b) => a - b);
  const hair = document.createElementNS("http://www.w3.org/2000/svg", "line");
  let at = -1;
  const nearest = (among, x) => {
    let from = 0, to = among.length - 1;
    while (to - from > 1) {
      const middle = (from + to) >> 1;
      if (among[middle] < x) from = middle; else to = middle;
    }
    return Math.abs(among[from] - x) <= Math.abs(among[to] - x) ? from : to;
  };
  const show = (place) => {
    at = Math.max(0, Math.min(places.length - 1, place));
    const x = places[at], across = left + (x - low) / (high - low) * (right - left);
    for (const [name, value] of Object.entries({ x1: across, x2: across, y1: top, y2: bottom, style: "stroke: var(--muted)" })) hair.setAttribute(name, value);
    svg.append(hair);
    const told = lines.map((line) => `${line.label} ${line.y[nearest(line.x, x)]}`);
    out.textContent = `${over} ${x.toLocaleString("en")}: ${told.join(" · ")}`;
  };
  plot.tabIndex = 0;
  plot.addEventListener("pointermove", (event) => {
    const box = svg.getBoundingClientRect(), across = (event.clientX - box.left) / box.width * svg.viewBox.baseVal.width;
    show(nearest(places, low + (across - left) / (right - left) * (high - low)));
  });
  plot.addEventListener("keydown", (event) => {
    const by = { ArrowLeft: -1, ArrowRight: 1, PageUp: -10, PageDown: 10, Home: -1e9, End: 1e9 }[event.key];
    if (by === undefined) return;
    event.preventDefault();
    show((at < 0 ? 0 : at) + by);
  });
  plot.addEventListener("pointerleave", () => { hair.remove(); out.textContent = ""; });
}
