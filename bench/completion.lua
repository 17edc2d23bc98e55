-- wrk's script: POSTs a prompt, and ends with one line of JSON. The environment: PROMPT_BYTES (0: a body of 230 bytes), MODEL,
-- STREAM_CHUNKS (0: no stream), PAUSE_MS (between an answer and the next request of its connection; 0: none), and PAGE: a path that is read instead.
local model = os.getenv("MODEL") or "bench-7b"
local prompt_bytes = tonumber(os.getenv("PROMPT_BYTES") or "0")
local pause_ms = tonumber(os.getenv("PAUSE_MS") or "0")

local question = "Say something about a quick brown fox and a lazy dog, please, in a sentence."
local body = '{"model":"' .. model .. '","messages":[{"role":"system","content":"You are a helpful assistant."},'
  .. '{"role":"user","content":"' .. question .. '"}],"max_tokens":8,"temperature":0.7}'
if prompt_bytes > 0 then
  local line = 'The \\"quick\\" brown fox jumps over the lazy dog.\\nIt did so again, and again. '
  local text = string.rep(line, math.ceil(prompt_bytes / #line))
  body = '{"model":"' .. model .. '","messages":[{"role":"user","content":"' .. text .. '"}],"max_tokens":8,"temperature":0.7}'
end

local stream_chunks = tonumber(os.getenv("STREAM_CHUNKS") or "0")
if stream_chunks > 0 then
  body = '{"model":"' .. model .. '","stream":true,"max_tokens":' .. stream_chunks .. ',"messages":[{"role":"user","content":"' .. question .. '"}]}'
end

local page = os.getenv("PAGE") or ""
if page ~= "" then
  wrk.path = page
else
  wrk.method = "POST"
  wrk.path = "/v1/chat/completions"
  wrk.headers["Content-Type"] = "application/json"
  wrk.body = body
end

-- Defined only where it is wanted: wrk's fast path has none.
if pause_ms > 0 then
  function delay() return pause_ms end
end

function done(summary, latency, requests)
  io.write(string.format(
    'RESULT {"requests":%d,"seconds":%.6f,"bytes":%d,"bad_status":%d,"bad_socket":%d,"p50_us":%d,"p90_us":%d,"p99_us":%d,"max_us":%d}\n',
    summary.requests, summary.duration / 1e6, summary.bytes, summary.errors.status,
    summary.errors.connect + summary.errors.read + summary.errors.write + summary.errors.timeout,
    latency:percentile(50), latency:percentile(90), latency:percentile(99), latency.max))
end
