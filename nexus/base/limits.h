// limits.h
// Owns:     every limit of Nexus that is not a key of nexus.conf: sizes, counts, times, each with its unit.
// Promises: the relations that other code relies on are asserted at compile time.
// Leaves:   limits that a user may set to config/keys.h, and their defaults to config/settings.h.
// Threads:  any; constants.
// Tested by: tests/config_test.cpp, tests/head_parser_test.cpp, tests/e2e/limits.test.mjs
#pragma once

#include <cstddef>
#include <cstdint>

#include "nexus/base/clock.h"

namespace nexus {

// ---- nexus.conf and its key files ----

constexpr std::size_t kMaxConfigFileBytes = 1u << 20;  // nexus.conf and each key file; larger: the path is wrong
constexpr std::size_t kMaxConfigErrors = 100;          // listed; a binary file must not flood the log
constexpr std::size_t kMaxQuotedBytes = 60;            // of a value that an error quotes
constexpr std::size_t kMaxBackends = 256;
constexpr std::size_t kMaxBackendNameBytes = 64;   // also of a client key's name
constexpr std::size_t kMaxModelsPerList = 10'000;  // also aliases, and models with fallbacks
constexpr std::size_t kMaxModelNameBytes = 256;
constexpr std::uint32_t kMaxAliasHops = 3;  // aliases that a name may lead through
constexpr std::size_t kMaxListens = 64;     // a key; each address costs a descriptor per worker
constexpr std::size_t kMaxOrigins = 64;     // of cors_origins
constexpr std::size_t kMaxAffinityHeaders = 32;
constexpr std::size_t kMaxUrlBytes = 2048;
constexpr std::size_t kMaxHostBytes = 253;   // RFC 1035 2.3.4, as text
constexpr std::size_t kMaxLabelBytes = 63;   // RFC 1035 2.3.4
constexpr std::size_t kMaxPathBytes = 4095;  // PATH_MAX without its NUL
constexpr std::uint64_t kMaxContextTokens = 1u << 30;
constexpr std::size_t kMinClientKeyBytes = 8;  // a shorter one can be guessed
constexpr std::size_t kMaxClientKeyBytes = 512;
constexpr std::size_t kMaxClientKeys = 10'000;
constexpr std::size_t kMaxBackendKeyBytes = 4096;  // a token that carries claims is long

// ---- clients' keys ----

constexpr std::uint32_t kMaxKeyPriority = 100;
constexpr std::uint32_t kDefaultKeyPriority = 50;
constexpr std::uint32_t kFirstKeyPlaces = 1u << 31;     // ids from here on are of keys' max_pending, not of backends
constexpr std::uint64_t kMaxPerMinute = 1'000'000'000;  // requests or tokens of a key
constexpr std::uint64_t kExpectedCompletion = 1'024;    // tokens, of an answer to come, for a limit by the minute
constexpr std::uint64_t kMaxFairCost = 1u << 20;        // tokens of a request that count for its turn, whatever is said
constexpr std::size_t kAddressFlows = 1'024;            // clients without a key, by address: some share a flow

// ---- names, for the life of the process ----

constexpr std::size_t kMaxModelNames = 20'000;           // models beyond it are counted as `unknown`
constexpr std::size_t kMaxBackendNames = 4'096;          // over all reloads; a reload with more is refused
constexpr std::size_t kMaxKeyNames = 10'002;             // `none` and `other` included; see [metrics] keys
constexpr std::size_t kMaxModelsPerBackend = 10'000;     // the rest of a longer list is ignored
constexpr std::size_t kMaxEndpoints = 64;                // rows of the table of endpoints, each counted by status
constexpr std::size_t kResponseIds = 1u << 17;           // of stored responses whose backend is remembered: 1 MiB
constexpr std::size_t kRecentKeys = 1u << 14;            // of sessions that were seen lately: 128 KiB
constexpr std::size_t kMaxModelEntryBytes = 8u << 10;    // of a model's own entry; a larger one is not passed on
constexpr std::size_t kMaxModelEntriesBytes = 1u << 20;  // of all entries of one backend, likewise

// ---- heads ----

constexpr std::size_t kMaxFields = 256;                      // per head: the most that max_fields can allow
constexpr std::size_t kKnownLineBits = 7;                    // sets of two lines that a thread knows: 32 KiB
constexpr std::size_t kMaxRequestIdBytes = 128;              // a longer one from a client is replaced
constexpr std::uint32_t kMaxInterimHeads = 16;               // 1xx heads before the final one
constexpr std::size_t kTextBytes = 16u << 10;                // reserved for heads and errors of our own
constexpr std::uint32_t kMaxChunkLineBytes = 256;            // a size line with its extensions
constexpr std::uint32_t kMaxTrailerBytes = 8192;             // all trailer lines together
constexpr std::uint32_t kMaxChunkExtensionBytes = 16 << 10;  // all extensions of one body together: they are useless

// ---- bodies ----

constexpr std::size_t kMaxJsonDepth = 512;                      // levels of a request's body
constexpr std::size_t kIncrementalBytes = 64u << 10;            // a larger request body is read while it comes
constexpr std::size_t kCopiedInputBytes = 1u << 20;             // up to this size the buffer of a chunked body doubles
constexpr std::size_t kLeastBodyBytes = 10u << 10;              // that must come in each kBodyLook: 1 KiB/s
constexpr std::size_t kMaxBoundaryBytes = 70;                   // of a multipart body (RFC 2046 5.1.1)
constexpr std::size_t kMaxPartHeadBytes = 4096;                 // of one part of it
constexpr std::size_t kMaxParts = 1024;                         // of one body
constexpr std::size_t kCopiedBodyBytes = 4096;                  // a smaller body is copied behind its head
constexpr std::size_t kMaxModelBytes = 256;                     // of a requested name, as kept for the log
constexpr std::size_t kMaxSessionBytes = 256;                   // of a name of a session; a longer one is none
constexpr std::size_t kLeastOpening = 256;                      // of a conversation that is worth a backend of its own
constexpr std::size_t kScannedOpening = 32u << 10;              // of a conversation, for its first message of the user
constexpr std::size_t kHashedOpening = 512;                     // of its beginning, and of the end of that message
constexpr std::size_t kListedModelBytes = 1024;                 // of model names in an error message
constexpr std::uint32_t kBytesPerToken = 4;                     // for the estimate of a prompt's length
constexpr std::int64_t kMaxTokenCount = std::int64_t{1} << 40;  // of one response; a larger one is not believed
constexpr std::size_t kFailuresShown = 20;                      // failed requests that the pages list
constexpr std::size_t kFailureTextBytes = 64;                   // of a model's name and of an id, in that list
constexpr std::size_t kUsageBytes = 16u << 10;       // a larger `usage` is ignored: real ones have a few hundred bytes
constexpr std::size_t kHeldEventBytes = 16u << 10;   // a larger event is not the usage event, and is not held
constexpr std::size_t kHeldAnswerBytes = 64u << 10;  // of a response that another backend may still replace
constexpr std::size_t kPathErrorBytes = 512;         // of a response that says that a server does not know the path
constexpr std::size_t kMaxProbeBytes = 16u << 20;    // of a backend's response to a health check
constexpr std::size_t kMaxJoinedBytes = 1u << 20;    // of a page that is joined with those of other backends
constexpr std::size_t kMaxTopPageBytes = 64u << 20;  // of a page that `nexus top` reads

// ---- memory ----

constexpr std::size_t kPaddingBytes = 64;        // readable behind a block: simdjson::SIMDJSON_PADDING
constexpr std::size_t kSmallestBlock = 4096;     // the capacity of a block of class 0
constexpr std::size_t kBlockClasses = 20;        // 4 KiB … 2 GiB
constexpr std::size_t kKeptBytes = 32u << 20;    // the most that a worker's pool keeps in its free lists
constexpr std::size_t kPageMemory = 64u << 20;   // of rendered pages that clients still read; then no more are rendered
constexpr std::size_t kKeptTextBytes = 2048;     // of a connection's text buffer between two requests
constexpr std::size_t kIdleSessionBytes = 1024;  // of a connection's texts together, between two requests
constexpr std::size_t kReturnedBytes = 1u << 20;  // freed at once by a worker; then the system gets free memory back
constexpr std::size_t kRoomyBlock = 64u << 10;    // for reading a response: most fit in one read

// ---- one turn of a loop: what one session may do before the others get their turn ----

// A session may have a share by an event and one by reschedule(): a quarter of a megabyte in all, for which the most
// awkward JSON takes about 3 ms on a slow machine.
constexpr std::size_t kFirstChecks = 8;  // of backends, that the control thread begins in a millisecond
constexpr std::uint32_t kClientReadsPerTurn = 1;
constexpr std::size_t kQueuedEvents = 1024;  // fetched and not handled; the kernel keeps what is more
constexpr std::size_t kEventsPerTurn = 256;  // then timers and rescheduled sessions have theirs
constexpr std::size_t kFreshEvents = 16;     // are handled in about 150 µs: then the kernel is asked for newer ones
constexpr std::size_t kFirstEvents = 12;  // of backends, and of one look: they go before clients', which keep a quarter
constexpr std::size_t kFirstReadBytes = 16u << 10;
constexpr std::size_t kMostReadBytes = 128u << 10;   // still in the processor's cache when it is parsed
constexpr std::uint32_t kReadsPerTurn = 16;          // of one response
constexpr std::size_t kSentPerTurn = 512u << 10;     // of one request
constexpr std::size_t kPageShareBytes = 128u << 10;  // of one rendered page: about 50 µs
constexpr std::uint32_t kShedAtOnce = 16;            // idle connections to backends, when descriptors are short
constexpr std::uint32_t kAcceptsPerTurn = 64;        // per listener
constexpr std::uint32_t kAcceptsAtDrain = 8192;      // per listener: more than a backlog holds
constexpr std::uint32_t kRequestsPerTurn = 8;        // pipelined ones that need no backend
constexpr std::size_t kMaxLingerBytes = 64u << 20;   // of a refused body that is dropped, over all turns

// ---- TLS ----

constexpr std::uint32_t kMaxKeyUpdates = 64;             // of a peer, without a byte of data between them
constexpr std::size_t kMaxCertificates = 64;             // of tls_certificate
constexpr Ns kExpiryWarning = 14 * 24 * 3600 * kSecond;  // before a certificate of the listeners expires
constexpr Ns kExpiryLook = 24 * 3600 * kSecond;          // between two looks at that

// ---- traces ----

constexpr std::size_t kMaxSpansWaiting = 2'048;    // for the collector, of all threads; those beyond it are lost
constexpr std::size_t kSpansPerExport = 512;       // in one request to the collector
constexpr std::size_t kMaxConversationBytes = 64;  // of a session's name in a span; a longer one is left out
constexpr std::uint32_t kPiecesForModel = 4;       // of a sampled response, that are asked for the model that answered
constexpr std::size_t kMaxCollectorAnswer = 64u << 10;   // of the collector's response
constexpr std::size_t kMaxResourceAttributes = 64;       // of OTEL_RESOURCE_ATTRIBUTES
constexpr std::size_t kMaxResourceAttributeBytes = 256;  // of a name and of a value
constexpr Ns kExportInterval = 5 * kSecond;              // a span waits no longer, if the collector answers
constexpr Ns kExportTime = 10 * kSecond;                 // for one request to the collector
constexpr Ns kExportRetry = kSecond;                     // after a failure; doubled up to the next
constexpr Ns kMaxExportRetry = 30 * kSecond;             // also of the collector's Retry-After
constexpr Ns kExportPatience = 60 * kSecond;             // then the spans of a request that failed are given up
constexpr Ns kLastExportTime = 2 * kSecond;              // of a drain: the last spans are sent

// ---- log ----

constexpr std::size_t kMaxLogValueBytes = 256;     // of one value; a longer one is cut and ends in an ellipsis
constexpr std::size_t kMaxReloadNote = 8000;       // of the errors that `nexus reload` prints: they fit a datagram
constexpr std::size_t kMaxLogMessageBytes = 2048;  // of an event's message, which may be a list

// ---- times ----

constexpr Ns kStaleWindow = kSecond;                // a reused connection that closes so soon was closed before
constexpr Ns kLatencyLife = 60 * kSecond;           // of a measured time to first byte
constexpr Ns kSeenLately = 600 * kSecond;           // a session may still be in a backend's cache
constexpr Ns kMaxEjection = 60 * kSecond;           // the doubling stops here, or at eject_time if that is longer
constexpr Ns kMaxRetryAfter = 300 * kSecond;        // a longer Retry-After of a backend is cut to this
constexpr Ns kRecheckEjected = 100 * kMillisecond;  // how often a queued request re-checks ejected backends
constexpr Ns kCountRetry = 100 * kMillisecond;      // after there was no memory to count a request
constexpr Ns kMemoryRetry = 100 * kMillisecond;     // after control found no memory for its work
constexpr Ns kAcceptPause = 100 * kMillisecond;     // after no descriptor was free
constexpr Ns kKeptAnswerTime = 250 * kMillisecond;  // for the rest of an error response
constexpr Ns kLackLogInterval = 60 * kSecond;       // between two lines about a lack of descriptors or ports
constexpr Ns kStrayLogInterval = kSecond;           // between two lines about unknown paths and methods
constexpr Ns kAttemptLogInterval = kSecond;         // between two lines about failed requests to one backend
constexpr Ns kTrimInterval = 5 * kSecond;           // memory that was not needed for so long is freed
constexpr Ns kPageTime = 30 * kSecond;              // for the control thread to render a page
constexpr Ns kLingerTime = 5 * kSecond;             // after our FIN, for the client's
constexpr Ns kBodyLook = 10 * kSecond;              // how often a body that has begun must have made progress
constexpr Ns kResolveInterval = 30 * kSecond;       // between two lookups of a backend's host name
constexpr Ns kFirstRecheck = kSecond;               // of a backend that is not up; doubled up to the interval
constexpr Ns kCheckPause = 100 * kMillisecond;      // between two wishes of a worker for an early check
constexpr Ns kMaxReloadHold = 2 * kSecond;          // a reload's snapshot waits so long for first checks
constexpr Ns kReloadWait = 2 * kMaxReloadHold;      // for a reload to be in force, before the service manager is told
constexpr Ns kReloadAnswer = 30 * kSecond;          // how long `nexus reload` waits for the outcome
constexpr Ns kHandOverTime = 100 * kMillisecond;    // of a drain: another worker may be handing over a connection
constexpr Ns kFirstRequestTime = kSecond;           // of a drain: a first request may be on its way
constexpr Ns kFarewellTime = kSecond;               // of a drain: kept connections get to see our FIN
constexpr Ns kAcceptRest = 50 * kMillisecond;       // of a drain: the backlog is accepted once more
constexpr Ns kLastAccepts = 60 * kMillisecond;      // of a drain: then connections are refused

// ---- relations ----

static_assert(kMaxModelBytes >= kMaxModelNameBytes, "a configured name is never cut in the log");
static_assert(kMaxModelNames >= kMaxModelsPerBackend && kMaxBackendNames >= kMaxBackends, "one fleet fits");
static_assert(kMostReadBytes >= kFirstReadBytes && kIncrementalBytes <= kMostReadBytes);
static_assert(kRoomyBlock >= kFirstReadBytes && kRoomyBlock <= kKeptBytes && kSmallestBlock <= kRoomyBlock);
static_assert(kTextBytes >= kListedModelBytes + kMaxRequestIdBytes + kMaxModelBytes, "an error needs no memory");
static_assert(kReloadAnswer > 2 * (kReloadWait + kSecond), "a signal that was merged with another is sent again");
static_assert(kHandOverTime <= kFirstRequestTime && kAcceptRest < kLastAccepts && kLastAccepts < kHandOverTime);
static_assert(kSpansPerExport <= kMaxSpansWaiting && (kMaxSpansWaiting & (kMaxSpansWaiting - 1)) == 0);
static_assert(kMaxLogValueBytes >= kMaxRequestIdBytes && kMaxLogValueBytes >= kMaxBackendNameBytes);

}  // namespace nexus
