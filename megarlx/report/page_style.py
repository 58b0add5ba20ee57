"""The page's style sheet: light and dark, from a phone's width to a desk's."""

STYLE = """
:root { color-scheme: light dark; --page: #ffffff; --line: #d9d9d9; --soft: #f6f6f4; --ink: #1c1c1c;
  --dim: #595959; --link: #00558a; --note: #fff8e8; --held: #00664a; --not: #a34200; }
@media (prefers-color-scheme: dark) {
  :root { --page: #16181b; --line: #3d4146; --soft: #212428; --ink: #e6e6e3; --dim: #a9a9a4;
    --link: #7cc4f5; --note: #2c2718; --held: #5fd0a8; --not: #f0a070; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 78rem; padding: 0 1rem 4rem; color: var(--ink);
  background: var(--page);
  font: 16px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "DejaVu Sans", sans-serif; }
h1 { margin: 1.2rem 0 .2rem; font-size: 1.1rem; color: var(--dim); overflow-wrap: anywhere; }
h2 { margin: 2.4rem 0 .3rem; font-size: 1.25rem; }
h3 { margin: 1rem 0 .3rem; font-size: 1rem; overflow-wrap: anywhere; }
p { margin: .3rem 0 .8rem; max-width: 52rem; overflow-wrap: anywhere; }
a { color: var(--link); }
h2 a { text-decoration: none; color: inherit; }
h2 a:hover::after { content: " #"; color: var(--dim); }
nav { display: flex; flex-wrap: wrap; gap: .2rem 1rem; padding: .5rem 0;
  border-bottom: 1px solid var(--line); }
.said { font-size: 1.5rem; line-height: 1.3; margin: .2rem 0 .6rem; max-width: 62rem; }
.facts { color: var(--dim); }
.note { border-left: 4px solid #e69f00; background: var(--note); padding: .5rem .8rem; }
figure { margin: 0; }
figure img { display: block; max-width: 100%; height: auto; }
figcaption { color: var(--dim); font-size: .85rem; }
table { border-collapse: collapse; width: 100%; font-size: .85rem;
  font-variant-numeric: tabular-nums; }
.rows { border: 1px solid var(--line); border-radius: 4px; max-height: 44rem; overflow-y: auto; }
th, td { padding: .28rem .6rem; text-align: left; vertical-align: top; }
td { overflow-wrap: break-word; } td.verdict { white-space: nowrap; }
thead th { position: sticky; top: 0; background: var(--soft); }
tbody tr:nth-child(even) { background: var(--soft); }
@media (max-width: 44rem) {
  thead { position: absolute; left: -200vw; }
  tbody tr { display: block; padding: .35rem 0; }
  tbody td, tbody th { display: grid; grid-template-columns: minmax(0, 2fr) minmax(0, 3fr);
    gap: .6rem; padding: .1rem .6rem; overflow-wrap: anywhere; }
  tbody td::before, tbody th::before { content: attr(data-label); color: var(--dim);
    font-weight: 400; } }
.verdict { font-weight: 600; }
.held { color: var(--held); } .not-held { color: var(--not); } .undetermined { color: var(--dim); }
pre { margin: .2rem 0 .8rem; padding: .6rem .8rem; background: var(--soft); border-radius: 4px;
  white-space: pre-wrap; overflow-wrap: anywhere; font-size: .82rem; }
details { margin: .6rem 0; } summary { cursor: pointer; }
ul { margin: 0; padding-left: 1.1rem; } li { overflow-wrap: anywhere; }
.lineage { font-size: .85rem; }
"""
