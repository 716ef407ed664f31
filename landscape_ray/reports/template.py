"""The look of the page: one style sheet and one script, both embedded, without any address to load from."""

from __future__ import annotations

STYLE = """
:root { color-scheme: light; --ground:#fff; --raised:#f6f8fa; --text:#1b1f24; --faint:#59636e; --line:#dfe4e9;
  --accent:#0072b2; --good:#00694b; --warn:#9a4400; --warnground:#fff4ea; }
:root[data-theme=dark] { color-scheme: dark; --ground:#15181c; --raised:#1d2126; --text:#e8ebee; --faint:#a4adb7;
  --line:#30363d; --accent:#56b4e9; --good:#2ec99d; --warn:#ffb27a; --warnground:#2b2119; }
* { box-sizing: border-box; }
html { scroll-behavior: smooth; -webkit-text-size-adjust: 100%; }
body { margin:0; background:var(--ground); color:var(--text); line-height:1.5;
  font: 16px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", "Liberation Sans", sans-serif; }
main { max-width:1080px; margin:0 auto; padding:0 20px 64px; }
header { padding:36px 0 8px; display:flex; gap:16px; align-items:flex-start; justify-content:space-between; }
h1 { font-size:1.9rem; line-height:1.2; margin:0 0 4px; overflow-wrap:anywhere; }
h2 { font-size:1.35rem; line-height:1.25; margin:56px 0 10px; padding-top:12px; border-top:1px solid var(--line);
  scroll-margin-top:44px; }
h3 { font-size:1.06rem; margin:30px 0 2px; }
p { margin:6px 0 10px; max-width:75ch; text-wrap:pretty; }
.lead { font-size:1.15rem; max-width:72ch; margin-top:22px; }
.asked { display:grid; grid-template-columns:repeat(auto-fit,minmax(min(100%,400px),1fr)); gap:0 36px; }
.faint, .note { color:var(--faint); } .note { font-size:.88rem; max-width:105ch; }
.takeaway { max-width:95ch; }
a { color:var(--accent); }
nav { position:sticky; top:0; z-index:5; background:var(--ground); border-bottom:1px solid var(--line); margin:0 -20px;
  padding:8px 20px; display:flex; gap:4px 18px; overflow-x:auto; white-space:nowrap; font-size:.92rem; }
nav a { text-decoration:none; padding:2px 0; } nav a:hover { text-decoration:underline; }
button { font:inherit; color:inherit; background:none; border:1px solid var(--line); border-radius:8px;
  cursor:pointer; }
button:focus-visible, a:focus-visible, th:focus-visible { outline:2px solid var(--accent); outline-offset:2px; }
button.save { font-size:.75rem; font-weight:400; color:var(--faint); padding:0 8px; margin-left:10px;
  vertical-align:2px; }
#theme { padding:4px 12px; font-size:.88rem; white-space:nowrap; color:var(--faint); }
.tiles { display:grid; grid-template-columns:repeat(auto-fit,minmax(260px,1fr)); gap:12px; margin:18px 0; }
.tile { background:var(--raised); border:1px solid var(--line); border-radius:12px; padding:14px 16px; min-width:0; }
.tile .term { font-size:.85rem; color:var(--faint); }
.tile .value { font-size:1.65rem; font-weight:650; line-height:1.2; overflow-wrap:anywhere;
  font-variant-numeric:tabular-nums; }
.tile .unit { font-size:.95rem; font-weight:400; color:var(--faint); }
.tile .more { font-size:.88rem; color:var(--faint); margin-top:2px; overflow-wrap:anywhere; }
dl { display:grid; grid-template-columns:max-content minmax(0,1fr); gap:4px 18px; margin:8px 0 18px; font-size:.95rem; }
dt { color:var(--faint); } dd { margin:0; overflow-wrap:anywhere; }
figure { margin:16px 0 30px; } figcaption { margin-bottom:6px; }
.plot { width:100%; min-height:120px; overflow:hidden; }
.legend { display:flex; flex-wrap:wrap; gap:4px 8px; margin:6px 0 4px; padding:0; font-size:.86rem; }
.legend button { border-color:transparent; border-radius:6px; padding:2px 8px 2px 4px; display:inline-flex; gap:6px;
  align-items:center; color:var(--text); text-align:left; overflow-wrap:anywhere; }
.legend button:hover { background:var(--raised); border-color:var(--line); }
.legend button[aria-pressed=false] { opacity:.4; text-decoration:line-through; }
.legend svg { flex:none; }
.empty { background:var(--raised); border:1px dashed var(--line); border-radius:10px; padding:12px 16px;
  color:var(--faint); }
.warnings { background:var(--warnground); border-left:4px solid var(--warn); border-radius:6px;
  padding:8px 16px; margin:12px 0; }
ul.prose { margin:4px 0 12px; padding-left:22px; max-width:80ch; } ul.prose li { margin:4px 0; }
.warnings ul { margin:4px 0; padding-left:20px; } .warnings li { overflow-wrap:anywhere; }
.good { color:var(--good); font-weight:600; } .bad { color:var(--warn); font-weight:600; }
.scroll { overflow-x:auto; margin:10px 0 22px; border:1px solid var(--line); border-radius:10px; }
table { border-collapse:collapse; width:100%; font-size:.88rem; font-variant-numeric:tabular-nums; }
th, td { text-align:right; padding:6px 10px; border-bottom:1px solid var(--line); white-space:nowrap; }
tbody tr:last-child td { border-bottom:0; }
th { background:var(--raised); font-weight:600; color:var(--faint); }
th.text, td.text { text-align:left; } tr.best td { background:color-mix(in srgb, var(--accent) 12%, transparent); }
table.sortable th { cursor:pointer; user-select:none; white-space:normal; vertical-align:bottom; }
table.sortable th[aria-sort=ascending]::after { content:" ▲"; }
table.sortable th[aria-sort=descending]::after { content:" ▼"; }
td.wrap { white-space:normal; min-width:16ch; overflow-wrap:anywhere; }
pre.wrap { white-space:pre-wrap; overflow-wrap:anywhere; }
details { margin:10px 0; } summary { cursor:pointer; color:var(--accent); }
pre { background:var(--raised); border:1px solid var(--line); border-radius:10px; padding:12px 16px; overflow-x:auto;
  font-size:.85rem; line-height:1.45; }
@media (max-width:600px) {
  main { padding:0 14px 40px; } nav { margin:0 -14px; padding:8px 14px; }
  h1 { font-size:1.5rem; } h2 { margin-top:40px; }
  header { padding-top:20px; } .tiles { grid-template-columns:repeat(2,minmax(0,1fr)); gap:8px; }
  .tile { padding:10px 12px; } .tile .value { font-size:1.25rem; }
  dl { grid-template-columns:1fr; gap:0; } dd { margin-bottom:8px; } th, td { padding:6px 8px; }
}
@media print {
  nav, #theme, button.save { display:none; } main { max-width:none; padding:0; } body { font-size:11pt; }
  figure, .tile, tr { break-inside:avoid; } h2, h3, figcaption { break-after:avoid; } h2 { margin-top:24pt; }
  .scroll { overflow:visible; border:0; } table { font-size:8pt; } th, td { padding:2pt 4pt; white-space:normal; }
  .plot { min-height:0; } pre { white-space:pre-wrap; font-size:8pt; }
}
"""

SCRIPT = """
(function () {
  'use strict';
  var page = JSON.parse(document.getElementById('figures').textContent);
  var root = document.documentElement, dark = matchMedia('(prefers-color-scheme: dark)');
  var chosen = null, printing = false, hidden = {};

  function theme() { return printing ? 'light' : chosen || (dark.matches ? 'dark' : 'light'); }
  function paint(value, colors) {
    if (typeof value === 'string' && value[0] === '@') {
      var parts = value.slice(1).split('/'), hex = colors[parts[0]];
      if (parts.length === 1) return hex;
      var rgb = [1, 3, 5].map(function (i) { return parseInt(hex.slice(i, i + 2), 16); });
      return 'rgba(' + rgb.join(',') + ',' + parts[1] + ')';
    }
    if (Array.isArray(value)) return value.map(function (v) { return paint(v, colors); });
    if (value && typeof value === 'object') {
      var out = {};
      Object.keys(value).forEach(function (key) { out[key] = paint(value[key], colors); });
      return out;
    }
    return value;
  }
  // Touch screens scroll with the finger: no dragging inside figures there.
  var touch = matchMedia('(pointer: coarse)').matches;
  var settings = { displaylogo: false, displayModeBar: false };

  function draw(key) {
    var spec = page.figures[key], node = document.getElementById('plot-' + key), colors = page.themes[theme()];
    var narrow = !printing && node.clientWidth < 520;
    var data = paint(spec.data, colors), layout = paint(spec.layout, colors);
    data.forEach(function (trace) {
      if (trace.legendgroup && hidden[key] && hidden[key][trace.legendgroup]) trace.visible = false;
      if (narrow && trace.marker && trace.marker.colorbar) {
        trace.marker.colorbar.orientation = 'h';
        trace.marker.colorbar.y = 1.02; trace.marker.colorbar.yanchor = 'bottom';
        trace.marker.colorbar.title.side = 'top';
      }
    });
    // on paper two figures share a page, and the tallest has one
    layout.height = printing ? Math.min(0.8 * spec.height, 780) : spec.height * (narrow ? 0.86 : 1);
    layout.width = printing ? 660 : node.clientWidth;
    if (narrow) {
      layout.font.size = 11;
      Object.keys(layout).forEach(function (name) {
        if (!/^[xy]axis/.test(name)) return;
        layout[name].title.font.size = 11.5;
        if (layout[name].nticks) layout[name].nticks = 5;
      });
    }
    if (touch) layout.dragmode = false;
    return Plotly.react(node, data, layout, settings);
  }
  function swatches(key) {
    var colors = page.themes[theme()];
    document.querySelectorAll('#legend-' + key + ' button').forEach(function (button) {
      button.querySelector('svg').style.color = colors[button.dataset.color];
    });
  }
  function all() {
    root.dataset.theme = theme();
    Object.keys(page.figures).forEach(function (key) { draw(key); swatches(key); });
  }

  document.querySelectorAll('.legend button').forEach(function (button) {
    button.addEventListener('click', function () {
      var key = button.dataset.figure, off = button.getAttribute('aria-pressed') === 'true';
      button.setAttribute('aria-pressed', String(!off));
      (hidden[key] = hidden[key] || {})[page.figures[key].legend[+button.dataset.index]] = off;
      draw(key);
    });
  });

  document.querySelectorAll('button.save').forEach(function (button) {
    button.addEventListener('click', function () {
      var key = button.dataset.figure, kind = button.dataset.kind, node = document.getElementById('plot-' + key);
      var scale = kind === 'png' ? 2 : 1, height = page.figures[key].height;
      Plotly.downloadImage(node, { format: kind, scale: scale, filename: key, width: 1000, height: height });
    });
  });

  document.getElementById('theme').addEventListener('click', function () {
    chosen = theme() === 'dark' ? 'light' : 'dark';
    all();
  });
  dark.addEventListener('change', all);
  var folded = [];
  addEventListener('beforeprint', function () {
    printing = true;
    folded = Array.from(document.querySelectorAll('details:not([open])'));
    folded.forEach(function (one) { one.open = true; });  // paper cannot be unfolded
    all();
  });
  addEventListener('afterprint', function () {
    printing = false;
    folded.forEach(function (one) { one.open = false; });
    all();
  });

  document.querySelectorAll('table.sortable').forEach(function (table) {
    var body = table.tBodies[0];
    function sort(head) {
      var up = head.getAttribute('aria-sort') !== 'ascending', column = head.cellIndex;
      table.querySelectorAll('th').forEach(function (th) { th.removeAttribute('aria-sort'); });
      head.setAttribute('aria-sort', up ? 'ascending' : 'descending');
      var rows = Array.from(body.rows).map(function (row, index) {
        var text = row.cells[column].dataset.value, number = parseFloat(text);
        return { row: row, index: index, text: text, number: number, missing: text === '' };
      });
      var numeric = rows.every(function (r) { return r.missing || (isFinite(r.text) && !isNaN(r.number)); });
      rows.sort(function (a, b) {
        if (a.missing || b.missing) return a.missing - b.missing || a.index - b.index;  // what is missing stays last
        var order = numeric ? a.number - b.number : a.text.localeCompare(b.text);
        return (up ? order : -order) || a.index - b.index;
      });
      rows.forEach(function (r) { body.appendChild(r.row); });
    }
    table.querySelectorAll('th').forEach(function (head) {
      head.tabIndex = 0;
      head.addEventListener('click', function () { sort(head); });
      head.addEventListener('keydown', function (event) {
        if (event.key === 'Enter' || event.key === ' ') { event.preventDefault(); sort(head); }
      });
    });
  });
  all();
  // a figure is laid out anew when its width changes: a phone that is turned, a window that is dragged
  var width = root.clientWidth, waiting = 0;
  new ResizeObserver(function () {
    if (printing || root.clientWidth === width) return;
    width = root.clientWidth;
    clearTimeout(waiting);
    waiting = setTimeout(all, 120);
  }).observe(root);
})();
"""

# The policy lets the page run its own script and load nothing: a report cannot reach a network even if it is asked to.
POLICY = (
    "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; img-src data: blob:; "
    "base-uri 'none'; form-action 'none'"
)

PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="{policy}">
<title>{title}</title>
<style>{style}</style>
<script>
document.documentElement.dataset.theme = matchMedia('(prefers-color-scheme: dark)').matches ? 'dark' : 'light';
</script>
</head>
<body>
<main>
{body}
</main>
<script type="application/json" id="figures">{figures}</script>
<script>{plotly}</script>
<script>{script}</script>
</body>
</html>
"""
