"""How the report looks: on a screen, light or dark, and on paper."""

STYLE = """
:root {
  color-scheme: light dark;
  --ink: #1d2129; --paper: #ffffff; --soft: #5b6472; --line: #dfe3e9; --faint: #f5f7f9; --accent: #0b6a9c;
  --warn-ink: #5c3b00; --warn: #fff4dc; --warn-line: #e0a100; --wrong: #b3261e; --shade: 0, 90, 150;
}
@media (prefers-color-scheme: dark) {
  :root {
    --ink: #e6e8ec; --paper: #15171b; --soft: #a3abb8; --line: #343a44; --faint: #1d2026; --accent: #6cbdec;
    --warn-ink: #ffe2a8; --warn: #332708; --warn-line: #c98f00; --wrong: #ff8a80; --shade: 30, 110, 180;
  }
}
@media print {
  :root {
    color-scheme: light;
    --ink: #000; --paper: #fff; --soft: #444; --line: #ccc; --faint: #fff; --accent: #000;
    --warn-ink: #000; --warn: #fff; --warn-line: #000; --wrong: #b3261e; --shade: 0, 90, 150;
  }
}
*, ::before, ::after { box-sizing: border-box }
html { -webkit-text-size-adjust: 100% }
body {
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Noto Sans", "Noto Sans KR", "Noto Sans CJK KR", sans-serif;
  color: var(--ink); background: var(--paper); max-width: 72rem; margin: 0 auto; padding: 2.5rem 1.25rem 4rem;
  overflow-wrap: anywhere;
}
h1 { font-size: 1.9rem; line-height: 1.2; letter-spacing: -.01em; margin: 0 0 .3rem; font-weight: 650 }
h2 { font-size: 1.3rem; margin: 0 0 .9rem; font-weight: 650; letter-spacing: -.005em }
h3 { font-size: 1.02rem; margin: 1.6rem 0 .6rem; font-weight: 650 }
section { padding-top: 1.9rem; margin-top: 1.9rem; border-top: 1px solid var(--line) }
a { color: var(--accent) }
code { font: .88em ui-monospace, "SF Mono", Menlo, Consolas, monospace }
small { font-size: .8rem; color: var(--soft) }
.note { color: var(--soft); font-size: .92rem; margin: .4rem 0 .9rem; max-width: 46rem }
.on-paper { display: none }
nav ul { list-style: none; display: flex; flex-wrap: wrap; gap: .3rem 1.2rem; padding: 0; margin: 1rem 0 0; font-size: .92rem }
nav a { text-decoration: none } nav a:hover { text-decoration: underline }

ul.warnings, ul.notes { list-style: none; padding: 0; margin: 0 0 .8rem }
ul.warnings li {
  background: var(--warn); color: var(--warn-ink); border-left: 4px solid var(--warn-line); border-radius: 0 6px 6px 0;
  padding: .55rem .9rem; margin: .45rem 0;
}
ul.notes li { color: var(--soft); padding-left: calc(.9rem + 4px); margin: .3rem 0 }
.about { opacity: .8; font-size: .92em }

.cards { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 24rem), 1fr)); gap: 1rem }
.card { align-self: start; border: 1px solid var(--line); border-radius: 10px; padding: 1.1rem 1.2rem; background: var(--faint) }
.card h3 { margin: 0 0 .7rem }
ol.steps { list-style: none; display: flex; flex-wrap: wrap; gap: .45rem 0; padding: 0; margin: 0 0 1rem }
ol.steps li {
  background: var(--paper); border: 1px solid var(--line); border-radius: 999px; padding: .15rem .75rem; font-size: .88rem;
}
ol.steps li + li { margin-left: 1.7rem; position: relative }
ol.steps li + li::before { content: "→"; position: absolute; left: -1.4rem; color: var(--soft) }
ol.steps li:last-child { border-color: var(--accent); color: var(--accent); font-weight: 600 }
dl { display: grid; grid-template-columns: 5.2rem 1fr; gap: .25rem .8rem; margin: 0; font-size: .9rem }
dt { color: var(--soft) } dd { margin: 0; overflow-wrap: anywhere }

ul.short { padding-left: 1.1rem; margin: 0 0 1.1rem }
.wide { overflow-x: auto; max-width: 100%; margin-bottom: .8rem }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: .92rem }
caption { text-align: left; font-weight: 600; padding: 0 0 .45rem; font-size: .95rem }
th, td { text-align: right; padding: .42rem .6rem; border-bottom: 1px solid var(--line); vertical-align: top }
thead th {
  font-weight: 600; color: var(--soft); font-size: .82rem; line-height: 1.25; vertical-align: bottom; overflow-wrap: normal;
}
tr > :first-child:not(td), th[scope=rowgroup] { text-align: left; padding-left: 0 }
th[scope=row], th[scope=rowgroup] { font-weight: 600; max-width: 13rem }
td { white-space: nowrap } td small { display: block; line-height: 1.3 }
.scores td.best .mean { font-weight: 700; color: var(--accent) }
.scores { width: 100% } .scores th[scope=rowgroup] { min-width: 8rem }
.scores th[scope=row] { text-align: right; font-weight: 400; white-space: nowrap }
.scores th small { display: block; line-height: 1.3 }
.confusion td {
  text-align: center; min-width: 4.2rem; border: 2px solid var(--paper); border-radius: 4px;
  background: rgba(var(--shade), calc(.05 + .95 * var(--share)));
}
.confusion td.dark, .confusion td.dark small { color: #fff }
.confusion td.light small { color: inherit; opacity: .75 }
.confusion thead th { text-align: center; max-width: 8rem; overflow-wrap: anywhere }
.confusion thead th:first-child { text-align: left }

.row { display: flex; flex-wrap: wrap; gap: 1.3rem 2.2rem; align-items: flex-start; margin-bottom: .6rem }
.row > * { min-width: 0; max-width: 100% }
figure { margin: 0; max-width: 100% }
figcaption { font-weight: 600; font-size: .92rem; margin-bottom: .3rem; max-width: 27rem }
figure svg { max-width: 100%; height: auto; display: block; stroke-linejoin: round; stroke-linecap: butt }
@media (prefers-color-scheme: dark) { figure svg { filter: brightness(1.15) } }
figure svg text { font-family: inherit !important }
img { max-width: 100%; height: auto; display: block }
ul.legend {
  list-style: none; display: flex; flex-wrap: wrap; gap: .2rem 1.1rem; padding: 0; margin: .4rem 0 .8rem; font-size: .86rem;
}
figure ul.legend, figure .note { max-width: 24rem }
ul.legend li { display: flex; align-items: center; gap: .45rem; min-width: 0 }
ul.legend .line { width: 1.6rem; flex: none } figure svg.mark, svg.mark { width: .75rem; height: .75rem; flex: none }

.neighbours { display: grid; grid-template-columns: repeat(6, minmax(0, 1fr)); gap: .7rem; max-width: 48rem; margin: 0 0 1.3rem }
.mistakes { display: grid; grid-template-columns: repeat(6, minmax(0, 1fr)); gap: 1.1rem 1rem }
.patch img { width: 96px; border-radius: 6px; border: 2px solid transparent }
.patch figcaption { font-weight: 400; font-size: .8rem; line-height: 1.35; color: var(--soft); margin: .3rem 0 0 }
.patch figcaption span { display: block } .patch b { color: var(--ink) }
.patch.wrong img { border-color: var(--wrong) } .patch.wrong figcaption span:first-child { color: var(--wrong) }
.neighbours > :first-child { border-right: 1px solid var(--line); padding-right: .6rem }
.views { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 26rem), 1fr)); gap: 1.4rem 2rem }
.pair { display: grid; grid-auto-flow: column; grid-auto-columns: minmax(0, 1fr); gap: .5rem }
.pair img { width: 100% }

details { margin: .45rem 0; border: 1px solid var(--line); border-radius: 8px; padding: .45rem .9rem }
summary { cursor: pointer; font-weight: 600 }
pre { font: .78rem/1.45 ui-monospace, Menlo, Consolas, monospace; white-space: pre-wrap; margin: .6rem 0; color: var(--soft) }

@media (max-width: 40rem) {
  body { padding: 1.3rem .9rem 3rem; font-size: 15px }
  h1 { font-size: 1.5rem }
  .neighbours, .mistakes { grid-template-columns: repeat(3, minmax(0, 1fr)) }
  .neighbours > :first-child { border-right: 0 }
  th[scope=row], th[scope=rowgroup] { max-width: 8.5rem } .scores th[scope=rowgroup] { min-width: 6rem }
}

@page { size: A4; margin: 14mm }
@media print {
  html { font-size: 9.5pt }
  body { font-size: 1rem; max-width: none; padding: 0; margin: 0 }
  * { -webkit-print-color-adjust: exact; print-color-adjust: exact }
  nav, details { display: none }
  .on-paper { display: block }
  h1 { font-size: 17pt } h2 { font-size: 13pt } h2, h3, caption, h2 + .note, h3 + .note, ul.legend { break-after: avoid }
  section { padding-top: 5mm; margin-top: 6mm }
  .wide { overflow: visible }
  .cards { grid-template-columns: 1fr 1fr; gap: 4mm }
  .card { padding: 3mm 4mm } .card:only-child { grid-column: 1 / -1 } dl { font-size: 8.5pt; grid-template-columns: 16mm 1fr }
  table { font-size: 8pt } thead th { font-size: 7.2pt } th, td { padding: 1mm 1.4mm } td small, th small { font-size: 6.8pt }
  th[scope=row], th[scope=rowgroup] { max-width: 34mm } .scores th[scope=rowgroup] { min-width: 18mm }
  .confusion td { min-width: 9mm } .confusion thead th { max-width: 18mm }
  figure, tr, .card, .neighbours, li { break-inside: avoid }
  .row > figure { max-width: 84mm }
  .neighbours { grid-template-columns: repeat(6, minmax(0, 1fr)); max-width: none }
  .patch img { width: 22mm }
  .views { grid-template-columns: 1fr 1fr; gap: 4mm } .pair { break-inside: avoid } .pair img { width: 100% }
}
"""
