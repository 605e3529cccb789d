"use strict";
(async () => {
  const unpack = (id) => {
    const bytes = Uint8Array.from(atob(document.getElementById(id).textContent), (letter) => letter.charCodeAt(0));
    return new Response(new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"))).text();
  };
  for (const button of document.querySelectorAll("button[data-copy]"))
    button.addEventListener("click", async () => {
      await navigator.clipboard.writeText(document.getElementById(button.dataset.copy).textContent);
      button.textContent = "copied";
    });
  const plots = [...document.querySelectorAll(".plot")];
  if (!plots.length) return;
  const [library, data] = await Promise.all([unpack("plotly"), unpack("figures")]);
  const figures = JSON.parse(data);
  const script = document.createElement("script");
  script.textContent = library;
  document.head.append(script);
  const dark = matchMedia("(prefers-color-scheme: dark)");
  const phone = matchMedia("(max-width: 640px)");
  const colour = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
  // the page's colours, as changes to a drawn chart
  const theme = () => {
    const look = { paper_bgcolor: colour("--paper"), plot_bgcolor: colour("--paper"), "font.color": colour("--ink"),
      "font.family": "system-ui, sans-serif" };
    for (const axis of ["xaxis", "yaxis"])
      for (const line of ["gridcolor", "linecolor", "zerolinecolor"]) look[`${axis}.${line}`] = colour("--line");
    return look;
  };
  const draw = (plot) => {
    const { data, layout } = figures[plot.id];
    Object.assign(layout, { legend: { orientation: "h", y: 1, yanchor: "bottom", x: 0 }, modebar: { orientation: "v" },
      margin: { l: 50, r: 36, t: 12, b: 44 }, autosize: true });
    for (const [path, value] of Object.entries(theme())) {
      const [last, ...groups] = path.split(".").reverse();
      groups.reverse().reduce((inner, name) => (inner[name] ??= {}), layout)[last] = value;
    }
    const buttons = [["zoom2d", "pan2d", "resetScale2d"], ["toImage"]];
    const bar = { displaylogo: false, displayModeBar: phone.matches ? false : "hover", modeBarButtons: buttons };
    Plotly.newPlot(plot, data, layout, { responsive: true, ...bar })
      .then(() => { plot.dataset.drawn = "yes"; });
  };
  // a chart is drawn when it comes near the window: a report of 100 runs is readable at once
  const seen = new IntersectionObserver((entries) => {
    for (const entry of entries)
      if (entry.isIntersecting) { seen.unobserve(entry.target); draw(entry.target); }
  }, { rootMargin: "400px" });
  for (const plot of plots) seen.observe(plot);
  dark.addEventListener("change", () => {
    for (const plot of plots) if (plot.dataset.drawn) Plotly.relayout(plot, theme());
  });
  addEventListener("beforeprint", () => { for (const plot of plots) if (!plot.dataset.drawn) draw(plot); });
})();
