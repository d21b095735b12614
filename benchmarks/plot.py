"""TFLOP/s of a Qwen3-30B MoE layer over tokens, as SVG, from results/moe_layer.json: python -m benchmarks.plot"""

from __future__ import annotations

import json
import pathlib
from html import escape

RESULTS = pathlib.Path(__file__).parent / "results"
COLORS = {"six ATen products": "#999999", "tedcompile": "#d62728", "HF grouped_mm + torch.compile": "#1f77b4",
          "HF grouped_mm": "#2ca02c"}  # fmt: skip
WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 640, 320, 56, 220, 24, 44


def svg(series: dict[str, dict[int, float]]) -> str:
    """`series`: name -> tokens -> TFLOP/s."""
    tokens = sorted({t for points in series.values() for t in points})
    highest = max(y for points in series.values() for y in points.values())
    top = 100 * (int(highest / 100) + 1)
    x = lambda t: LEFT + tokens.index(t) * (WIDTH - LEFT - RIGHT) / max(len(tokens) - 1, 1)
    y = lambda v: HEIGHT - BOTTOM - v * (HEIGHT - TOP - BOTTOM) / top
    parts = [f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" font-family="sans-serif" '
             'font-size="12">', f'<rect width="{WIDTH}" height="{HEIGHT}" fill="white"/>']  # fmt: skip
    for v in range(0, top + 1, 100):
        parts.append(f'<path d="M{LEFT} {y(v):.1f}H{WIDTH - RIGHT}" stroke="#ddd"/>')
        parts.append(f'<text x="{LEFT - 8}" y="{y(v) + 4:.1f}" text-anchor="end">{v}</text>')
    for t in tokens:
        parts.append(f'<text x="{x(t):.1f}" y="{HEIGHT - BOTTOM + 18}" text-anchor="middle">{t:,}</text>')
    parts.append(f'<text x="{(LEFT + WIDTH - RIGHT) / 2}" y="{HEIGHT - 8}" text-anchor="middle">tokens</text>')
    parts.append(f'<text x="{LEFT}" y="14">TFLOP/s, forward + backward, bf16</text>')
    for name, points in series.items():
        line = " ".join(f"{x(t):.1f},{y(points[t]):.1f}" for t in sorted(points))
        last = max(points)
        parts.append(f'<polyline points="{line}" fill="none" stroke="{COLORS[name]}" stroke-width="2"/>')
        parts.append(
            f'<text x="{x(last) + 8:.1f}" y="{y(points[last]) + 4:.1f}" fill="{COLORS[name]}">{escape(name)}</text>'
        )
    return "\n".join([*parts, "</svg>", ""])


def main() -> None:
    series: dict[str, dict[int, float]] = {}
    for row in json.loads((RESULTS / "moe_layer.json").read_text()):
        model, tokens, routing = row["case"].split()
        if (model, routing, row["metric"]) == ("qwen3-30b", "balanced", "throughput"):
            series.setdefault(row["system"], {})[int(tokens)] = row["value"]
    (RESULTS / "moe_layer.svg").write_text(svg(series))


if __name__ == "__main__":
    main()
