// chart.mjs: node bench/chart.mjs RESULTS.json >results.svg
// Owns:     the proxy benchmark's results as one SVG: for each load, the CPU time as a ratio to the floor, a bar a proxy.
// Promises: no script, font or style from elsewhere; readable on a light and a dark page.
// Leaves:   measuring to proxy_bench.mjs, which writes RESULTS.json.
import fs from 'node:fs';

const colours = { nexus: '#2563eb', nginx: '#94a3b8', haproxy: '#cbd5e1' };
const names = { nexus: 'Nexus', nginx: 'nginx', haproxy: 'HAProxy' };
const width = 900, label_width = 360, right = 90, bar = 13, gap = 3, group_gap = 16, top = 84;

const escape = (text) => text.replace(/[&<>"]/g, (c) => ({ '&': '&amp;', '<': '&lt;', '>': '&gt;', '"': '&quot;' })[c]);

export function draw(results) {
  const rows = results.parts.flatMap((part) => part.rows).filter((row) => row.ratios && /: CPU/.test(row.label));
  const most = Math.max(1.5, ...rows.flatMap((row) => Object.values(row.ratios))) * 1.05;
  const scale = (ratio) => (ratio / most) * (width - label_width - right);
  const group_height = 3 * (bar + gap) + group_gap;
  const height = top + rows.length * group_height + 20;
  const out = [
    `<svg xmlns="http://www.w3.org/2000/svg" width="${width}" height="${height}" viewBox="0 0 ${width} ${height}" font-family="system-ui, sans-serif" font-size="12">`,
    `<rect width="${width}" height="${height}" fill="#ffffff"/>`,
    `<text x="16" y="24" font-size="16" font-weight="600" fill="#0f172a">CPU time of the proxy, as a ratio to a blind TCP forwarder (1.0 = the kernel's own cost)</text>`,
    `<text x="16" y="44" fill="#475569">${escape(`${results.date}; ${results.machine}; medians of ${results.rounds} rounds`)}</text>`,
  ];
  Object.entries(names).forEach(([key, name], i) => {
    out.push(`<rect x="${16 + i * 90}" y="56" width="12" height="12" fill="${colours[key]}"/><text x="${33 + i * 90}" y="66" fill="#0f172a">${name}</text>`);
  });
  rows.forEach((row, i) => {
    const y = top + i * group_height;
    out.push(`<text x="${label_width - 10}" y="${y + 2 * bar}" text-anchor="end" fill="#0f172a">${escape(row.label.replace(/: CPU.*$/, ''))}</text>`);
    Object.keys(names).forEach((key, j) => {
      if (!(row.ratios[key] > 0)) return;
      const bar_y = y + j * (bar + gap);
      const length = scale(row.ratios[key]);
      out.push(`<rect x="${label_width}" y="${bar_y}" width="${length.toFixed(1)}" height="${bar}" fill="${colours[key]}"/>`);
      out.push(`<text x="${(label_width + length + 5).toFixed(1)}" y="${bar_y + 11}" fill="#334155">${row.ratios[key].toFixed(2)} (${row.values[key].toFixed(1)} µs)</text>`);
    });
  });
  const one = (label_width + scale(1)).toFixed(1);
  out.push(`<line x1="${one}" y1="${top - 6}" x2="${one}" y2="${height - 14}" stroke="#dc2626" stroke-dasharray="4 3"/>`);
  out.push(`<text x="${one}" y="${height - 3}" text-anchor="middle" fill="#dc2626">1.0</text>`, '</svg>');
  return `${out.join('\n')}\n`;
}

if (process.argv[1] && import.meta.url.endsWith(process.argv[1].split('/').pop())) {
  process.stdout.write(draw(JSON.parse(fs.readFileSync(process.argv[2], 'utf8'))));
}
