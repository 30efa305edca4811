// The style sheet of a report's page: one column of text as on paper, light and dark by the
// reader's system, always light in print.
#pragma once

namespace omq {

inline constexpr const char* kReportStyle = R"css(
:root{color-scheme:light dark;--paper:#fff;--ink:#1b1c1e;--soft:#585c62;--faint:#8b9097;
--rule:#cfd2d6;--hair:#e7e9eb;--blue:#1d5a9e;--alarm:#b3401f}
@media (prefers-color-scheme:dark){:root{--paper:#16181b;--ink:#e4e4e1;--soft:#a9adb3;
--faint:#7d8289;--rule:#464a50;--hair:#2a2d31;--blue:#86b6ec;--alarm:#ee8d68}}
@media print{:root{color-scheme:light;--paper:#fff;--ink:#000;--soft:#444;--faint:#777;
--rule:#bbb;--hair:#e2e2e2;--blue:#1d5a9e;--alarm:#b3401f}
@page{size:A4;margin:17mm 16mm}body{padding:0;font-size:10pt}
figure,tr,.numbers{break-inside:avoid}h2,summary{break-after:avoid}
details:not([open]){display:none}}
*{box-sizing:border-box}
body{margin:0 auto;max-width:768px;padding:44px 24px 72px;background:var(--paper);
color:var(--ink);font:15.5px/1.5 "Source Serif 4","Source Serif Pro",Charter,
"Bitstream Charter","Iowan Old Style","Palatino Linotype",Palatino,Georgia,"Liberation Serif",
"Times New Roman",serif;font-variant-numeric:lining-nums;-webkit-text-size-adjust:100%}
h1{font-size:1.7em;font-weight:600;line-height:1.2;margin:0}
h1 span{font-weight:400;color:var(--soft);white-space:nowrap}
.under{margin:.3em 0 0;color:var(--soft)}
h2{font-size:1.1em;font-weight:600;margin:1.9em 0 .7em;padding-top:.5em;
border-top:1px solid var(--rule)}
p{margin:.5em 0}sub{line-height:0;font-size:.75em}.missing{color:var(--soft);font-style:italic}
.numbers{display:grid;grid-template-columns:repeat(auto-fit,minmax(6.4em,1fr));gap:.9em 1.2em;
margin:1.6em 0 0;padding:.9em 0 0;border-top:1.5px solid var(--ink)}
.numbers b{display:block;font-size:1.5em;font-weight:400;line-height:1.2;white-space:nowrap}
.numbers span{color:var(--soft);font-size:.86em;line-height:1.3;display:block}
table{border-collapse:collapse;width:100%;font-size:.9em;line-height:1.4}
th,td{text-align:left;vertical-align:baseline;padding:.22em 1.1em .22em 0;
border-bottom:1px solid var(--hair);font-weight:400}
th:last-child,td:last-child{padding-right:0}
thead th{color:var(--soft);border-bottom:1px solid var(--rule);vertical-align:bottom}
.right{text-align:right;font-variant-numeric:lining-nums tabular-nums;white-space:nowrap}
.hash{font:.63em/1.4 ui-monospace,"SF Mono",Menlo,Consolas,"DejaVu Sans Mono",
"Liberation Mono",monospace;overflow-wrap:anywhere;color:var(--soft)}
.name{overflow-wrap:anywhere}.dense{font-size:.78em}.dense th,.dense td{padding-right:.7em}
.scroll{overflow-x:auto}
figure{margin:0 0 1.6em}figcaption{margin-top:.55em;font-size:.9em;line-height:1.42;
color:var(--soft)}figcaption b{color:var(--ink);font-weight:600}
svg{display:block;width:100%;min-width:560px;height:auto;overflow:visible}
details{margin:.9em 0}summary{cursor:pointer;color:var(--soft);font-size:.9em;margin:0 0 .5em}
dl{columns:2;column-gap:2.4em;margin:0;font-size:.9em;line-height:1.4}
dl div{display:flex;gap:.9em;padding:.24em 0;border-bottom:1px solid var(--hair);
break-inside:avoid}
dt{flex:0 0 8.6em;color:var(--soft)}dd{margin:0;overflow-wrap:anywhere}
@media (max-width:620px){dl{columns:1}}
svg text{font:10px "Source Sans 3","Source Sans Pro","Helvetica Neue",Helvetica,Arial,
"Liberation Sans",sans-serif;fill:var(--ink)}
.start{text-anchor:start}.middle{text-anchor:middle}.end{text-anchor:end}
svg .tick{fill:var(--soft);font-size:9px}svg .label{fill:var(--soft)}
svg .head{font-size:10.5px}
.grid{stroke:var(--hair);stroke-width:.8}.axis{stroke:var(--faint);stroke-width:.8}
.span{stroke:var(--blue);stroke-opacity:.45;stroke-width:1.2}
.before{fill:var(--paper);stroke:var(--faint);stroke-width:1.1}
.after{fill:var(--blue);stroke:none}
.curve{fill:none;stroke:var(--blue);stroke-width:1.3;stroke-linejoin:round}
.faint.curve{stroke:var(--faint);stroke-width:.9}
.alarm{stroke:var(--alarm);stroke-width:1.2}
.bar{fill:var(--blue)}
.sum{fill:var(--blue);fill-opacity:.22;stroke:var(--blue);stroke-width:.8}
.heat1,.heat2,.heat3,.heat4,.heat5,.heat6,.heat7,.heat8{fill:var(--blue);
shape-rendering:crispEdges}
.heat1{fill-opacity:.1}.heat2{fill-opacity:.2}.heat3{fill-opacity:.32}.heat4{fill-opacity:.44}
.heat5{fill-opacity:.57}.heat6{fill-opacity:.7}.heat7{fill-opacity:.84}.heat8{fill-opacity:1}
)css";

}  // namespace omq
