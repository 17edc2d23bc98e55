// api_shapes.mjs
// Owns:     what servers of each API send: one row for an answer, plain or streamed, with the counts that it tells.
// Promises: member names, their order and their nesting are those of the servers; streams are written with LF.
// Leaves:   how the bytes are cut, and the expectations about Nexus, to the tests.
const say = (data) => `event: ${data.type}\ndata: ${JSON.stringify(data)}\n\n`;
const only_data = (data) => `data: ${JSON.stringify(data)}\n\n`;
const lines = (list) => list.map((line) => `${JSON.stringify(line)}\n`).join('');
const json = 'application/json';
const sse = 'text/event-stream; charset=utf-8';
const ndjson = 'application/x-ndjson';

// ---- /v1/responses ----

const responses = '/v1/responses';
const asks_response = (stream) => ({ model: 'm1', input: 'Hi', ...(stream && { stream: true }) });
const usage_of = (input, cached, output, more = {}) => ({ input_tokens: input, input_tokens_details: { cached_tokens: cached }, output_tokens: output, output_tokens_details: { reasoning_tokens: 0 }, total_tokens: input + output, ...more });
const message_item = { id: 'msg_1', type: 'message', status: 'completed', content: [{ type: 'output_text', annotations: [], logprobs: [], text: 'One two' }], role: 'assistant' };
const response_of = (status, usage, more = {}) => ({
  id: 'resp_1', object: 'response', created_at: 1741476777, status, background: false, error: null, incomplete_details: null, instructions: null, max_output_tokens: null, model: 'm1',
  output: status === 'in_progress' ? [] : [message_item], parallel_tool_calls: true, previous_response_id: null, reasoning: { effort: null, summary: null }, store: true, temperature: 1,
  text: { format: { type: 'text' } }, tool_choice: 'auto', tools: [], top_p: 1, truncation: 'disabled', usage, user: null, metadata: {}, ...more,
});

// The events of a stream up to its last; `last` is that one's type.
function response_events(last, usage, more = {}) {
  const status = { 'response.completed': 'completed', 'response.incomplete': 'incomplete', 'response.failed': 'failed' }[last];
  const at = { item_id: 'msg_1', output_index: 0, content_index: 0 };
  const events = [
    { type: 'response.created', response: response_of('in_progress', null) },
    { type: 'response.in_progress', response: response_of('in_progress', null) },
    { type: 'response.output_item.added', output_index: 0, item: { ...message_item, status: 'in_progress', content: [] } },
    { type: 'response.content_part.added', ...at, part: { type: 'output_text', annotations: [], logprobs: [], text: '' } },
    { type: 'response.output_text.delta', ...at, delta: 'One', logprobs: [] },
    { type: 'response.output_text.delta', ...at, delta: ' two', logprobs: [] },
    { type: 'response.output_text.done', ...at, text: 'One two', logprobs: [] },
    { type: 'response.content_part.done', ...at, part: message_item.content[0] },
    { type: 'response.output_item.done', output_index: 0, item: message_item },
  ];
  if (status) events.push({ type: last, response: response_of(status, usage, more) });
  return events.map((event, sequence_number) => ({ ...event, sequence_number }));
}
// As vLLM and Ollama write them: the members in the order of their names, `type` last.
const by_name = (event) => Object.fromEntries(Object.entries(event).sort(([a], [b]) => (a < b ? -1 : 1)));
const vllm_usage = {
  input_tokens: 41, input_tokens_details: { cached_tokens: 16, input_tokens_per_turn: [], cached_tokens_per_turn: [] }, output_tokens: 9,
  output_tokens_details: { reasoning_tokens: 3, tool_output_tokens: 0, output_tokens_per_turn: [], tool_output_tokens_per_turn: [] }, total_tokens: 50,
};
const llamacpp_response_events = [
  { type: 'response.created', response: { id: 'resp_2', object: 'response', status: 'in_progress' } },
  { type: 'response.in_progress', response: { id: 'resp_2', object: 'response', status: 'in_progress' } },
  { type: 'response.output_item.added', item: { content: [], id: 'msg_2', role: 'assistant', status: 'in_progress', type: 'message' } },
  { type: 'response.content_part.added', item_id: 'msg_2', part: { type: 'output_text', text: '' } },
  { type: 'response.output_text.delta', item_id: 'msg_2', delta: 'One' },
  { type: 'response.output_text.done', item_id: 'msg_2', text: 'One' },
  { type: 'response.completed', response: { id: 'resp_2', object: 'response', created_at: 1770000000, status: 'completed', model: 'm1', output: [{ ...message_item, id: 'msg_2' }], usage: usage_of(23, 5, 4) } },
];

// ---- /v1/messages ----

const messages = '/v1/messages';
const asks_message = (stream) => ({ model: 'm1', max_tokens: 64, messages: [{ role: 'user', content: 'Hi' }], ...(stream && { stream: true }) });
const message_of = (usage, more = {}) => ({ id: 'msg_01XFDUDYJgAACzvnptvVoYEL', type: 'message', role: 'assistant', model: 'm1', content: [], stop_reason: null, stop_sequence: null, ...(usage && { usage }), ...more });
const whole_message = (usage) => message_of(usage, { content: [{ type: 'text', text: 'One two' }], stop_reason: 'end_turn' });
const ping = 'event: ping\ndata: {"type": "ping"}\n\n';

// `start` and `end`: usage in message_start and message_delta; `beside`: it stands beside `message`, as vLLM's first releases had it.
function message_events(start, end, { beside = false, pings = true, stop = true } = {}) {
  const delta = { type: 'message_delta', delta: { stop_reason: 'end_turn', stop_sequence: null }, usage: end };
  return say({ type: 'message_start', message: message_of(beside ? null : start), ...(beside && { usage: start }) })
    + say({ type: 'content_block_start', index: 0, content_block: { type: 'text', text: '' } }) + (pings ? ping : '')
    + say({ type: 'content_block_delta', index: 0, delta: { type: 'text_delta', text: 'One' } })
    + say({ type: 'content_block_delta', index: 0, delta: { type: 'text_delta', text: ' two' } }) + (pings ? ping : '')
    + say({ type: 'content_block_stop', index: 0 }) + say(delta) + (stop ? say({ type: 'message_stop' }) : '');
}
const cached_usage = (output) => ({ input_tokens: 25, cache_creation_input_tokens: 100, cache_read_input_tokens: 400, cache_creation: { ephemeral_5m_input_tokens: 100, ephemeral_1h_input_tokens: 0 }, output_tokens: output, service_tier: 'standard' });
const no_cache_usage = (input, output) => ({ input_tokens: input, output_tokens: output, cache_creation_input_tokens: null, cache_read_input_tokens: null });
const overloaded = { type: 'error', error: { details: null, type: 'overloaded_error', message: 'Overloaded' }, request_id: 'req_011' };

// ---- Ollama ----

const ollama_end = { done_reason: 'stop', done: true, total_duration: 4883583458, load_duration: 1334875, prompt_eval_count: 26, prompt_eval_duration: 342546000, eval_count: 282, eval_duration: 4535599000 };
const ollama_chat = (content, more) => ({ model: 'm1', created_at: '2026-08-04T19:22:45.499127Z', message: { role: 'assistant', content }, ...more });
const ollama_text = (response, more) => ({ model: 'm1', created_at: '2026-08-04T19:22:45.499127Z', response, ...more });
const asks_chat = (more) => ({ model: 'm1', messages: [{ role: 'user', content: 'Hi' }], ...more });

// ---- llama.cpp's own ----

const timings = { cache_n: 12, prompt_n: 18, prompt_ms: 30.9, prompt_per_token_ms: 1.7, prompt_per_second: 582.5, predicted_n: 35, predicted_ms: 661, predicted_per_token_ms: 18.9, predicted_per_second: 52.9 };
const llamacpp_piece = (content, n) => ({ index: 0, content, tokens: [n], stop: false, id_slot: -1, tokens_predicted: n, tokens_evaluated: 30 });
const llamacpp_end = (content) => ({ index: 0, content, tokens: [], id_slot: 0, stop: true, model: 'm1', tokens_predicted: 35, tokens_evaluated: 30, generation_settings: { n_predict: 64, stop: [], stream: true }, prompt: 'Once', has_new_line: false, truncated: false, stop_type: 'limit', stopping_word: '', tokens_cached: 64, timings });

const picture = { created: 1713833628, data: [{ b64_json: 'aGVsbG8=' }] };
const picture_usage = { total_tokens: 100, input_tokens: 50, output_tokens: 50, input_tokens_details: { text_tokens: 10, image_tokens: 40 } };
const asks_rerank = { model: 'm1', query: 'q', documents: ['a', 'b'] };

// What looks like counts, an error or an end, where it is none of these: in texts, arguments, schemas and the events of tools.
const decoy = { usage: { input_tokens: 999, output_tokens: 999, prompt_tokens: 999 }, error: { message: 'no' }, prompt_eval_count: 999, done: true, type: 'error', response: { usage: { input_tokens: 999 } } };
const decoy_text = `data: ${JSON.stringify(decoy)}\n\nevent: error\n\n[DONE]`;
const decoy_more = { instructions: decoy_text.repeat(500), metadata: { usage: decoy_text, error: 'x' }, tools: [{ type: 'function', name: 'usage', parameters: { type: 'object', properties: decoy } }] };
const decoy_events = [
  { type: 'response.created', response: response_of('in_progress', null, decoy_more) },
  { type: 'response.output_text.delta', item_id: 'msg_1', output_index: 0, content_index: 0, delta: decoy_text, logprobs: [] },
  { type: 'response.mcp_call.failed', item_id: 'mcp_1', output_index: 1 },
  { type: 'response.mcp_list_tools.failed', item_id: 'mcpl_1', output_index: 2 },
  { type: 'response.output_item.done', output_index: 1, item: { id: 'mcp_1', type: 'mcp_call', name: 'f', arguments: JSON.stringify(decoy), error: { type: 'http_error', code: 500 }, output: null } },
  { type: 'response.completed', response: response_of('completed', usage_of(36, 12, 87), decoy_more) },
].map((event, sequence_number) => ({ ...event, sequence_number }));
const tool_use = { type: 'tool_use', id: 'toolu_1', name: 'f', input: decoy };
const iterations = [{ type: 'message', input_tokens: 999, output_tokens: 999, cache_read_input_tokens: 999, cache_creation_input_tokens: 999 }];
const decoy_message_events = say({ type: 'message_start', message: message_of(cached_usage(1)) }) + say({ type: 'content_block_start', index: 0, content_block: tool_use })
  + say({ type: 'content_block_delta', index: 0, delta: { type: 'input_json_delta', partial_json: decoy_text } }) + say({ type: 'content_block_stop', index: 0 })
  + say({ type: 'message_delta', delta: { stop_reason: 'tool_use', stop_sequence: null }, usage: { iterations, output_tokens: 15, server_tool_use: { web_search_requests: 1 } } }) + say({ type: 'message_stop' });

// A row: [name, path, request, type, text, { prompt, completion, cached, ends, error, silent }]. A count that is missing is not told;
// ends = false: a stream without its end mark; error: the type of error it is counted as; silent: nobody expects counts of it.
export const answers = [
  ['OpenAI', responses, asks_response(false), json, JSON.stringify(response_of('completed', usage_of(36, 12, 87)), null, 2), { prompt: 36, completion: 87, cached: 12 }],
  ['OpenAI', responses, asks_response(true), sse, response_events('response.completed', usage_of(36, 12, 87)).map(say).join(''), { prompt: 36, completion: 87, cached: 12 }],
  ['OpenAI, cut by max_output_tokens', responses, asks_response(true), sse, response_events('response.incomplete', usage_of(11, 0, 16), { incomplete_details: { reason: 'max_output_tokens' } }).map(say).join(''), { prompt: 11, completion: 16, cached: 0 }],
  ['OpenAI, failed', responses, asks_response(true), sse, response_events('response.failed', null, { error: { code: 'server_error', message: 'The model failed' } }).map(say).join(''), { error: 'backend_error' }],
  ['OpenAI, failed with counts', responses, asks_response(true), sse, response_events('response.failed', usage_of(8, 0, 2), { error: { code: 'server_error', message: 'The model failed' } }).map(say).join(''), { prompt: 8, completion: 2, error: 'backend_error' }],
  ['OpenAI, an error event', responses, asks_response(true), sse, [...response_events('', null).slice(0, 5), { type: 'error', code: 'server_error', message: 'Busy', param: null, sequence_number: 5 }].map(say).join(''), { error: 'backend_error', ends: false }],
  ['OpenAI, without its end', responses, asks_response(true), sse, response_events('', null).map(say).join(''), { ends: false }],
  ['vLLM, failed', responses, asks_response(true), sse, response_events('response.failed', null, { error: { code: 'server_error', message: 'The model failed' } }).map(by_name).map(say).join(''), { error: 'backend_error' }],
  ['vLLM, without its end', responses, asks_response(true), sse, response_events('', null).map(by_name).map(say).join(''), { ends: false }],
  ['vLLM', responses, asks_response(false), json, JSON.stringify(response_of('completed', vllm_usage)), { prompt: 41, completion: 9, cached: 16 }],
  ['vLLM', responses, asks_response(true), sse, response_events('response.completed', vllm_usage).map(by_name).map(say).join(''), { prompt: 41, completion: 9, cached: 16 }],
  ['llama.cpp', responses, asks_response(true), sse, llamacpp_response_events.map(say).join(''), { prompt: 23, completion: 4, cached: 5 }],
  ['Ollama', responses, asks_response(true), sse, response_events('response.completed', usage_of(19, 0, 6)).map(by_name).map(say).join(''), { prompt: 19, completion: 6 }],
  ['LM Studio, unnamed events', responses, asks_response(true), sse, response_events('response.completed', usage_of(19, 7, 6)).map(only_data).join(''), { prompt: 19, completion: 6, cached: 7 }],
  ['SGLang, no usage', responses, asks_response(false), json, JSON.stringify(response_of('completed', null)), {}],
  ['OpenAI, a tool that fails, and decoys', responses, asks_response(true), sse, decoy_events.map(say).join(''), { prompt: 36, completion: 87, cached: 12 }],
  ['OpenAI, decoys', responses, asks_response(false), json, JSON.stringify({ ...decoy_more, ...response_of('completed', usage_of(36, 12, 87), decoy_more) }), { prompt: 36, completion: 87, cached: 12 }],
  ['llama.cpp', '/v1/responses/input_tokens', asks_response(false), json, '{"object":"response.input_tokens","input_tokens":21}', { silent: true }],

  ['Anthropic', messages, asks_message(false), json, JSON.stringify(whole_message(cached_usage(15))), { prompt: 525, completion: 15, cached: 400 }],
  ['Anthropic', messages, asks_message(true), sse, message_events(cached_usage(1), { output_tokens: 15 }), { prompt: 525, completion: 15, cached: 400 }],
  ['Anthropic, all counts twice', messages, asks_message(true), sse, message_events(cached_usage(1), { input_tokens: 25, cache_creation_input_tokens: 100, cache_read_input_tokens: 400, output_tokens: 15 }), { prompt: 525, completion: 15, cached: 400 }],
  ['Anthropic, overloaded in its stream', messages, asks_message(true), sse, message_events(cached_usage(1), { output_tokens: 2 }, { stop: false }) + say(overloaded), { prompt: 525, completion: 2, cached: 400, error: 'backend_error', ends: false }],
  ['Anthropic, without its end', messages, asks_message(true), sse, message_events(cached_usage(1), { output_tokens: 3 }, { stop: false }), { prompt: 525, completion: 3, cached: 400, ends: false }],
  ['Ollama, an estimate first', messages, asks_message(true), sse, message_events({ input_tokens: 40, output_tokens: 0 }, { input_tokens: 31, output_tokens: 7 }, { pings: false }), { prompt: 31, completion: 7 }],
  ['vLLM, first releases', messages, asks_message(true), sse, `${message_events({ input_tokens: 31, output_tokens: 0 }, { input_tokens: 31, output_tokens: 7 }, { beside: true, pings: false })}data: [DONE]\n\n`, { prompt: 31, completion: 7 }],
  ['vLLM, cached counts only at the end', messages, asks_message(true), sse, message_events({ input_tokens: 31, output_tokens: 0 }, { input_tokens: 21, output_tokens: 7, cache_read_input_tokens: 10 }, { pings: false }), { prompt: 31, completion: 7, cached: 10 }],
  ['llama.cpp', messages, asks_message(true), sse, message_events({ cache_read_input_tokens: 10, input_tokens: 21, output_tokens: 0 }, { output_tokens: 7 }, { pings: false }), { prompt: 31, completion: 7, cached: 10 }],
  ['LM Studio', messages, asks_message(false), json, JSON.stringify(whole_message(no_cache_usage(17, 5))), { prompt: 17, completion: 5 }],
  ['Anthropic, a tool and decoys', messages, asks_message(true), sse, decoy_message_events, { prompt: 525, completion: 15, cached: 400 }],
  ['Anthropic, a tool and decoys', messages, asks_message(false), json, JSON.stringify(message_of({ iterations, ...cached_usage(15) }, { content: [tool_use] })), { prompt: 525, completion: 15, cached: 400 }],
  ['Anthropic', '/v1/messages/count_tokens', asks_message(false), json, '{"input_tokens":14}', { silent: true }],

  ['Ollama', '/api/chat', asks_chat({ stream: false }), json, JSON.stringify(ollama_chat('One two', ollama_end)), { prompt: 26, completion: 282 }],
  ['Ollama, streams unasked', '/api/chat', asks_chat({}), ndjson, lines([ollama_chat('One', { done: false }), ollama_chat(' two', { done: false }), ollama_chat('', ollama_end)]), { prompt: 26, completion: 282 }],
  ['Ollama', '/api/generate', { model: 'm1', prompt: 'Hi', stream: true }, ndjson, lines([ollama_text('One', { done: false }), ollama_text('', { ...ollama_end, context: [1, 2, 3] })]), { prompt: 26, completion: 282 }],
  ['Ollama, a tool and decoys', '/api/chat', asks_chat({ stream: true }), ndjson, lines([ollama_chat(decoy_text, { done: false }), { ...ollama_chat('', { done: false }), message: { role: 'assistant', content: '', tool_calls: [{ function: { name: 'f', arguments: decoy } }] } }, ollama_chat('', ollama_end)]), { prompt: 26, completion: 282 }],
  ['Ollama, all of it cached', '/api/chat', asks_chat({ stream: false }), json, JSON.stringify(ollama_chat('One', { ...ollama_end, prompt_eval_count: undefined })), { completion: 282 }],
  ['Ollama, loads the model', '/api/generate', { model: 'm1', stream: false }, json, JSON.stringify(ollama_text('', { done: true, done_reason: 'load' })), {}],
  ['Ollama, an error line', '/api/chat', asks_chat({ stream: true }), ndjson, lines([ollama_chat('One', { done: false }), { error: 'an error was encountered while running the model' }]), { error: 'backend_error', ends: false }],
  ['Ollama, without its end', '/api/chat', asks_chat({ stream: true }), ndjson, lines([ollama_chat('One', { done: false }), ollama_chat(' two', { done: false })]), { ends: false }],
  ['Ollama', '/api/embed', { model: 'm1', input: ['a', 'b'] }, json, '{"model":"m1","embeddings":[[0.01,-0.2],[0.5,0.1]],"total_duration":14143917,"load_duration":1019500,"prompt_eval_count":8}', { prompt: 8 }],
  ['Ollama', '/api/embeddings', { model: 'm1', prompt: 'a' }, json, '{"embedding":[0.5670403838157654,0.009260174818336964]}', { silent: true }],
  ['Ollama', '/api/show', { model: 'm1' }, json, '{"modelfile":"FROM m1","parameters":"","template":"{{ .Prompt }}","details":{"format":"gguf","family":"llama"},"capabilities":["completion"]}', { silent: true }],

  ['vLLM', '/v1/rerank', asks_rerank, json, '{"id":"rerank-1","model":"m1","usage":{"prompt_tokens":56,"total_tokens":56},"results":[{"index":1,"document":{"text":"b","multi_modal":null},"relevance_score":0.99}]}', { prompt: 56 }],
  ['vLLM', '/rerank', asks_rerank, json, '{"id":"rerank-1","model":"m1","usage":{"prompt_tokens":56,"total_tokens":56},"results":[]}', { prompt: 56 }],
  ['llama.cpp', '/reranking', asks_rerank, json, '{"model":"m1","object":"list","usage":{"prompt_tokens":42,"total_tokens":42},"results":[{"index":0,"relevance_score":-2.5}]}', { prompt: 42 }],
  ['Cohere', '/v2/rerank', asks_rerank, json, '{"id":"07734bd2","results":[{"index":1,"relevance_score":0.99}],"meta":{"api_version":{"version":"2"},"billed_units":{"search_units":1}}}', {}],
  ['SGLang, a list', '/v1/rerank', asks_rerank, json, '[{"score":0.99,"document":"b","index":1,"meta_info":{"id":"x","prompt_tokens":9}}]', {}],
  ['vLLM', '/v1/score', { model: 'm1', text_1: 'a', text_2: 'b' }, json, '{"id":"score-1","object":"list","created":1770000000,"model":"m1","data":[{"index":0,"object":"score","score":1.0}],"usage":{"prompt_tokens":13,"total_tokens":13,"completion_tokens":0,"prompt_tokens_details":null}}', { prompt: 13, completion: 0 }],
  ['vLLM', '/tokenize', { model: 'm1', prompt: 'Hi' }, json, '{"count":2,"max_model_len":4096,"tokens":[1,2],"token_strs":null}', { silent: true }],
  ['llama.cpp, no model', '/tokenize', { content: 'Hi' }, json, '{"tokens":[1,2]}', { silent: true }],
  ['vLLM', '/detokenize', { model: 'm1', tokens: [1, 2] }, json, '{"prompt":"Hi"}', { silent: true }],
  ['OpenAI', '/v1/moderations', { input: 'Hi' }, json, '{"id":"modr-1","model":"omni-moderation-latest","results":[{"flagged":false,"categories":{"hate":false},"category_scores":{"hate":0.1}}]}', { silent: true }],

  ['OpenAI', '/v1/images/generations', { model: 'm1', prompt: 'a cat' }, json, JSON.stringify({ ...picture, usage: picture_usage }), { prompt: 50, completion: 50 }],
  ['LocalAI', '/v1/images/generations', { prompt: 'a cat' }, json, JSON.stringify(picture), {}],
  ['OpenAI', '/v1/images/generations', { model: 'm1', prompt: 'a cat', stream: true }, sse, say({ type: 'image_generation.partial_image', partial_image_index: 0, b64_json: 'aGVs' }) + say({ type: 'image_generation.completed', b64_json: 'aGVsbG8=', created_at: 1741476777, usage: picture_usage }), { prompt: 50, completion: 50 }],
  ['OpenAI', '/v1/audio/speech', { model: 'm1', input: 'Hi', voice: 'alloy', stream_format: 'sse' }, sse, say({ type: 'speech.audio.delta', audio: 'aGVs' }) + say({ type: 'speech.audio.done', usage: { input_tokens: 14, output_tokens: 101, total_tokens: 115 } }), { prompt: 14, completion: 101 }],
  ['a speech server', '/v1/audio/speech', { model: 'm1', input: 'Hi', voice: 'alloy' }, 'audio/mpeg', 'ID3\x04\x00\x00"usage":{"input_tokens":9}', {}],

  ['llama.cpp', '/completion', { prompt: 'Once', n_predict: 64 }, json, JSON.stringify(llamacpp_end(' upon')), { prompt: 30, completion: 35, cached: 12 }],
  ['llama.cpp', '/completion', { prompt: 'Once', stream: true }, sse, [llamacpp_piece(' upon', 1), llamacpp_piece(' a', 2), llamacpp_end('')].map(only_data).join(''), { prompt: 30, completion: 35, cached: 12 }],
  ['llama.cpp, decoys', '/completion', { prompt: 'Once', stream: true }, sse, [llamacpp_piece(decoy_text, 1), { ...llamacpp_end(''), prompt: decoy_text }].map(only_data).join(''), { prompt: 30, completion: 35, cached: 12 }],
  ['llama.cpp, without its end', '/completion', { prompt: 'Once', stream: true }, sse, [llamacpp_piece(' upon', 1), llamacpp_piece(' a', 2)].map(only_data).join(''), { prompt: 30, completion: 2, ends: false }],
  ['llama.cpp, an error event', '/infill', { input_prefix: 'a', input_suffix: 'b', stream: true }, sse, only_data(llamacpp_piece('x', 1)) + only_data({ error: { code: 500, message: 'context shift failed', type: 'server_error' } }), { prompt: 30, completion: 1, error: 'backend_error', ends: false }],
  ['llama.cpp', '/apply-template', { messages: [{ role: 'user', content: 'Hi' }] }, json, '{"prompt":"<|user|>Hi"}', { silent: true }],

  ['SGLang, cached counts', '/v1/chat/completions', asks_chat({}), json, '{"id":"1","object":"chat.completion","created":1,"model":"m1","choices":[{"index":0,"message":{"role":"assistant","content":"Hi"},"finish_reason":"stop"}],"usage":{"prompt_tokens":33,"total_tokens":40,"completion_tokens":7,"prompt_tokens_details":{"cached_tokens":32},"reasoning_tokens":0}}', { prompt: 33, completion: 7, cached: 32 }],
  ['vLLM, counts in each chunk', '/chat/completions', asks_chat({ stream: true, stream_options: { include_usage: true, continuous_usage_stats: true } }), sse, [[33, 1], [33, 2]].map(([p, c]) => only_data({ id: '1', object: 'chat.completion.chunk', created: 1, model: 'm1', choices: [{ index: 0, delta: { content: 'x' }, finish_reason: null }], usage: { prompt_tokens: p, total_tokens: p + c, completion_tokens: c } })).join('') + only_data({ id: '1', object: 'chat.completion.chunk', created: 1, model: 'm1', choices: [], usage: { prompt_tokens: 33, total_tokens: 35, completion_tokens: 2 } }) + 'data: [DONE]\n\n', { prompt: 33, completion: 2 }],
].map(([server, path, ask, type, text, told]) => ({ server, name: `${server}: ${path}${type === sse || type === ndjson ? ', streamed' : ''}`, path, ask, type, text, streams: type === sse || type === ndjson, ends: true, ...told }));

// The answer of `server` to a request, or its last one where it has several.
export function answer_of(server, path, streams) {
  const row = answers.findLast((r) => r.path === path && r.streams === streams && r.server === server);
  if (!row) throw new Error(`no answer of ${server} to ${path}${streams ? ', streamed' : ''}`);
  return row;
}

// A backend's script: it answers as `server` does.
export const answers_as = (server) => (request, reply) => {
  const ask = request.json;
  const path = request.path.replace(/\?.*/, '');
  const row = answer_of(server, path, ask.stream === true || ask.stream_format === 'sse' || (ask.stream === undefined && path === '/api/chat'));
  reply.body(200, Buffer.from(row.text, 'latin1'), { 'Content-Type': row.type });
};

// How servers say that they do not know a path, on `path`: [status, type, body].
export const unknown_path = (path) => ({
  'vLLM, SGLang': [404, json, '{"detail":"Not Found"}'],
  'Ollama, LocalAI': [404, 'text/plain', '404 page not found'],
  'llama.cpp': [404, json, '{"error":{"message":"File Not Found","type":"not_found_error","code":404}}'],
  OpenAI: [404, json, JSON.stringify({ error: { message: `Invalid URL (POST ${path})`, type: 'invalid_request_error', param: null, code: null } }, null, 2)],
  'LM Studio': [200, json, JSON.stringify({ error: `Unexpected endpoint or method. (POST ${path})` })],
  'nothing but the status': [404, 'text/plain', ''],
});
