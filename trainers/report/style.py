"""The page's style sheet."""

from __future__ import annotations

from collections.abc import Mapping

from .drawing import DARK, LIGHT


def _variables(colours: Mapping[str, str]) -> str:
    return "".join(f"--{name}:{colour};" for name, colour in colours.items())


STYLE = (
    ":root{color-scheme:light dark;"
    + _variables(LIGHT)
    + "--warn:#7a5900;--page:#f7f7f5;--card:#ffffff;--line:#e2e3e0;}"
    + "@media (prefers-color-scheme:dark){:root{"
    + _variables(DARK)
    + "--warn:#dcb340;--page:#14171b;--card:#1b1f25;--line:#2c313a;}}"
    + """
:root{
--sans:system-ui,-apple-system,"Segoe UI",Roboto,"Helvetica Neue",Arial,sans-serif;
--mono:ui-monospace,"SF Mono","Cascadia Mono",Menlo,Consolas,"Liberation Mono",monospace;}
*{box-sizing:border-box}
html{-webkit-text-size-adjust:100%;text-size-adjust:100%}
body{margin:0;background:var(--page);color:var(--ink);font:16px/1.5 var(--sans)}
main{max-width:1120px;margin:0 auto;padding:40px 24px 64px}
h1{font-size:30px;line-height:1.2;letter-spacing:-.015em;font-weight:650;margin:0 0 6px;
overflow-wrap:anywhere}
h2{font-size:19px;line-height:1.3;letter-spacing:-.005em;font-weight:650;margin:48px 0 14px}
h3{font-size:14px;line-height:1.4;font-weight:600;margin:0}
p{margin:0}
.lead{color:var(--muted);max-width:95ch;overflow-wrap:anywhere}
.lead b{color:var(--ink);font-weight:600}
.badge{display:inline-block;vertical-align:3px;margin-left:10px;padding:1px 10px;border-radius:99px;
font-size:13px;font-weight:600;line-height:20px;letter-spacing:0;border:1px solid currentColor}
.badge.done{color:var(--green)}
.badge.open{color:var(--warn)}
.notice{margin-top:16px;padding:10px 14px;border-left:3px solid var(--gold);background:var(--card);
font-size:14px}
.cards{display:grid;grid-template-columns:repeat(4,1fr);gap:1px;margin:28px 0 0;
background:var(--line);border:1px solid var(--line);border-radius:10px;overflow:hidden}
.card{background:var(--card);padding:16px 18px;min-width:0}
.card dt{font-size:13px;color:var(--muted)}
.card dd{margin:0}
.card .value{font-size:26px;line-height:1.25;font-weight:620;letter-spacing:-.02em;
font-variant-numeric:tabular-nums;white-space:nowrap}
.card .value small{font-size:14px;font-weight:500;letter-spacing:0;color:var(--muted)}
.card .note{font-size:13px;line-height:1.4;color:var(--muted);font-variant-numeric:tabular-nums}
.card .good{color:var(--green)}
.card .bad{color:var(--orange)}
.share{height:5px;margin:7px 0 2px;border-radius:3px;background:var(--grid);overflow:hidden}
.share i{display:block;height:100%;background:var(--blue)}
.figures{display:grid;grid-template-columns:repeat(2,minmax(0,1fr));gap:16px}
.figures.three{grid-template-columns:repeat(3,minmax(0,1fr))}
figure{margin:0;padding:16px 18px 14px;background:var(--card);border:1px solid var(--line);
border-radius:10px;min-width:0}
figure.wide{grid-column:1/-1}
figure svg{display:block;width:100%;height:auto;margin:8px 0 4px;overflow:visible}
figure .narrow{display:none}
figcaption{font-size:13px;line-height:1.5;color:var(--muted);max-width:96ch}
.keys{display:flex;flex-wrap:wrap;gap:2px 16px;margin:3px 0 0;padding:0;list-style:none;
font-size:13px;line-height:1.5;color:var(--muted);min-height:20px}
.keys li{display:flex;align-items:center;gap:7px;min-width:0;overflow-wrap:anywhere}
.keys i{flex:none;width:18px;height:0;border-top:2.5px solid}
.keys .faint{opacity:.4}
.keys .dashed{border-top-style:dashed}
.keys .dotted{border-top-style:dotted}
.keys .dashdot{border-top-style:dashed;width:12px}
.keys .point{width:9px;height:9px;border:0;border-radius:50%;background:currentColor}
.keys .area{width:11px;height:11px;border:0;border-radius:2px;background:currentColor}
.sheet{background:var(--card);border:1px solid var(--line);border-radius:10px;overflow-x:auto}
table{width:100%;border-collapse:collapse;font-size:14px;font-variant-numeric:tabular-nums}
th,td{padding:7px 18px;text-align:left;vertical-align:top;border-top:1px solid var(--line)}
tr:first-child>th,tr:first-child>td{border-top:0}
thead th{font-size:13px;font-weight:500;color:var(--muted)}
thead+tbody tr:first-child>th,thead+tbody tr:first-child>td{border-top:1px solid var(--line)}
tbody th{font-weight:400;color:var(--muted);width:38%}
td{overflow-wrap:anywhere}
td.figure,th.figure{text-align:right;white-space:nowrap}
td.best{font-weight:650;color:var(--ink)}
.columns{columns:2;column-gap:16px}
.columns .block{break-inside:avoid;margin-bottom:16px}
.block h3{margin:0 0 6px}
.block td,.block th{font:13px/1.5 var(--mono);padding:5px 14px}
.block tbody th{width:46%}
details{background:var(--card);border:1px solid var(--line);border-radius:10px;margin-top:16px}
summary{padding:11px 18px;cursor:pointer;font-size:14px;font-weight:600}
summary:focus-visible{outline:2px solid var(--blue);outline-offset:2px;border-radius:10px}
details .sheet{border:0;border-top:1px solid var(--line);border-radius:0 0 10px 10px}
footer{margin-top:48px;padding-top:14px;border-top:1px solid var(--line);color:var(--muted);
font-size:13px;overflow-wrap:anywhere}
@media (max-width:960px){.cards{grid-template-columns:repeat(2,1fr)}
.figures.three{grid-template-columns:repeat(2,minmax(0,1fr))}}
@media (max-width:720px){
main{padding:24px 14px 40px}
h1{font-size:24px}
h2{margin-top:36px}
.figures,.figures.three{grid-template-columns:minmax(0,1fr)}
.columns{columns:1}
figure{padding:13px 13px 12px}
figure .narrow{display:block}
figure .narrow~svg{display:none}
.card{padding:12px 13px}
.card .value{font-size:21px}
th,td{padding:7px 12px}}
@media print{
body{background:none}
main{max-width:none;padding:0}
figure,.cards,.block{break-inside:avoid}}
"""
)
