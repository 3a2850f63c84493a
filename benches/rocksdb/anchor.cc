// The anchor: RocksDB as an expert would tune it for "was this key seen before?", on the keys of `benches/run dedup`.
//
//   anchor load --state DIR --keys N --state-seed S                     state as sorted tables in the bottom level
//   anchor run  --state DIR --keys N --state-seed S --run-seed R --batch B --batches K --load mix|worst
//               [--threads 16] [--cache-bytes 629145600]                one JSON object on standard output
//
// A batch: sort and find copies within the batch -> sorted MultiGet on all threads -> new keys into sorted tables,
// which are ingested (no memtable, no log). Keys are 16 bytes, values are empty; block checksums are on and verified.
// `run` works on hard links of what `load` made, so the loaded state can be used again.
//
// Tuning at 1e8 keys, mix, batches of 1 M, two cores; CPU is of the whole process, per event. Item 1 was measured with a
// prototype on a quiet machine, the others on a busy one: their CPU and reads count, their rates do not.
// 1. Partitioned filters, page cache, memtable, 2 threads: 6.2 us, 0.14 M/s. Full filters, direct reads, one ingested
//    run per batch: 3.2 us, 0.32 M/s. The same with 8 threads 0.45-0.59 M/s, with 16 or 32 2.5 us and 0.65-0.83 M/s.
// 2. Filters and indexes held by the open tables, not by the cache: no lookup per table. Where they do not fit, a cache
//    in 8 parts (in 64 parts a filter of 10 MB is larger than its part, and is read again and again).
// 3. 16 bits of filter where they fit, not 10: 0.033 instead of 0.038 reads per event. Hash index in blocks: no gain.
// 4. Level 0 compacted every 8 batches, not every 4 (with item 3): 3.4 instead of 4.1 us.
// 5. 0.6-0.8 M/s in the first batches, with few runs in level 0; less as its compaction falls behind (CPU is the limit).
//    Universal compaction (width 2 or 4, 6 or 8 runs), one table per batch, lookups at a lower priority than compaction:
//    level 0 stays at 1-3 runs then, and the rate over 24 batches at 0.3-0.4 M/s.
// 6. No gain: blocks that straddle pages; 32 or 512 or (at 1e7) 2048 keys per call. Loss (at 1e7): data blocks not cached,
//    twice the CPU.

#include <rocksdb/cache.h>
#include <rocksdb/db.h>
#include <rocksdb/filter_policy.h>
#include <rocksdb/sst_file_writer.h>
#include <rocksdb/statistics.h>
#include <rocksdb/table.h>
#include <rocksdb/utilities/checkpoint.h>
#include <sys/resource.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <functional>
#include <map>
#include <memory>
#include <string>
#include <thread>
#include <vector>

namespace {

using rocksdb::Slice;
using rocksdb::Status;

// ---- keys: the arithmetic of keys.rs, to the bit

constexpr uint64_t kStep = 0x9e3779b97f4a7c15;
constexpr uint64_t kNearKeys = 5'000'000;

uint64_t Mix(uint64_t value) {
  value = (value ^ (value >> 30)) * 0xbf58476d1ce4e5b9;
  value = (value ^ (value >> 27)) * 0x94d049bb133111eb;
  return value ^ (value >> 31);
}

uint64_t Scaled(uint64_t draw, uint64_t below) {
  return static_cast<uint64_t>((static_cast<unsigned __int128>(draw) * below) >> 64);
}

struct Id {
  uint64_t high;
  uint64_t low;
  bool operator<(const Id& other) const { return high != other.high ? high < other.high : low < other.low; }
  bool operator==(const Id& other) const { return high == other.high && low == other.low; }
};

struct Keys {
  uint64_t state_seed;
  uint64_t run_seed;
  uint64_t prepared;

  Id Of(uint64_t number) const {
    const uint64_t seed = number < prepared ? state_seed : run_seed;
    return {Mix(seed + number * kStep), Mix((seed << 32 | seed >> 32) ^ number * kStep)};
  }
};

struct Stream {
  Keys keys;
  bool worst;
  uint64_t next_key;
  uint64_t next_event;

  // The key of the next event; says whether it is a new one.
  Id Next(bool* is_new) {
    const uint64_t event = next_event++;
    const uint64_t kind = Scaled(Mix((keys.run_seed ^ 1) + event * kStep), 100);
    const uint64_t pick = Mix((keys.run_seed ^ 2) + event * kStep);
    *is_new = kind < 94 || next_key == 0;
    if (*is_new) return keys.Of(next_key++);
    if (!worst && kind < 98) return keys.Of(next_key - 1 - Scaled(pick, std::min(next_key, kNearKeys)));
    return keys.Of(Scaled(pick, next_key));
  }
};

// ---- the machine

void Check(const Status& status) {
  if (!status.ok()) {
    std::fprintf(stderr, "rocksdb: %s\n", status.ToString().c_str());
    std::exit(1);
  }
}

double Now() {
  return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

double CpuSeconds() {
  rusage usage{};
  getrusage(RUSAGE_SELF, &usage);
  const auto seconds = [](const timeval& time) { return time.tv_sec + time.tv_usec * 1e-6; };
  return seconds(usage.ru_utime) + seconds(usage.ru_stime);
}

// The number after a word in a file of /proc/self.
uint64_t ProcNumber(const char* file, const std::string& word) {
  std::ifstream in(std::string("/proc/self/") + file);
  std::string line;
  while (std::getline(in, line)) {
    if (line.rfind(word, 0) == 0) return std::strtoull(line.c_str() + word.size(), nullptr, 10);
  }
  return 0;
}

// Calls work(piece) for every piece below `pieces`, on that many threads.
void OnThreads(size_t threads, size_t pieces, const std::function<void(size_t)>& work) {
  std::atomic<size_t> next{0};
  std::vector<std::thread> pool;
  for (size_t thread = 0; thread < std::min(threads, pieces); ++thread) {
    pool.emplace_back([&] {
      for (size_t piece = next++; piece < pieces; piece = next++) work(piece);
    });
  }
  for (auto& thread : pool) thread.join();
}

// ---- settings

struct Settings {
  std::map<std::string, std::string> values;

  std::string Text(const std::string& name, const std::string& otherwise) const {
    const auto found = values.find(name);
    return found == values.end() ? otherwise : found->second;
  }
  uint64_t Number(const std::string& name, uint64_t otherwise) const {
    const auto found = values.find(name);
    return found == values.end() ? otherwise : std::strtoull(found->second.c_str(), nullptr, 10);
  }
};

rocksdb::Options OptionsOf(const Settings& settings) {
  const uint64_t cache_bytes = settings.Number("cache-bytes", 600 << 20);
  const uint64_t keys = settings.Number("keys", 0);
  // More than 10 bits save reads, while there is memory for them.
  const uint64_t filter_bits = settings.Number("filter-bits", keys * 18 / 8 < cache_bytes / 2 ? 16 : 10);
  // Filters and indexes of all tables; an index entry of about 25 bytes stands for a block of 150 keys.
  const uint64_t filter_bytes = keys * (filter_bits + 2) / 8;
  const bool filters_cached = settings.Number("cache-filters", filter_bytes < cache_bytes / 2 ? 0 : 1) != 0;

  rocksdb::BlockBasedTableOptions table;
  table.filter_policy.reset(rocksdb::NewBloomFilterPolicy(static_cast<double>(filter_bits), false));
  table.block_size = settings.Number("block-bytes", 4096);
  table.block_align = settings.Number("align", 1) != 0;
  table.format_version = 5;
  table.checksum = rocksdb::kXXH3;
  if (settings.Number("hash-index", 0) != 0) {
    table.data_block_index_type = rocksdb::BlockBasedTableOptions::kDataBlockBinaryAndHash;
  }
  // What fits is held by the open tables, without a lookup in the cache; what does not is cached before data.
  table.cache_index_and_filter_blocks = filters_cached;
  table.cache_index_and_filter_blocks_with_high_priority = true;
  // A filter of a table of 4 M keys takes 5 MB: a part of the cache must hold many of them.
  table.block_cache = filters_cached ? rocksdb::NewLRUCache(cache_bytes, 3, false, 0.9)
                                     : rocksdb::NewLRUCache(cache_bytes - filter_bytes, 6, false, 0.0);

  rocksdb::Options options;
  options.create_if_missing = true;
  options.table_factory.reset(rocksdb::NewBlockBasedTableFactory(table));
  options.compression = rocksdb::kNoCompression;
  options.use_direct_reads = settings.Number("direct", 1) != 0;
  options.use_direct_io_for_flush_and_compaction = options.use_direct_reads;
  options.compaction_readahead_size = 2 << 20;
  options.max_background_jobs = 2;
  options.max_open_files = -1;
  options.write_buffer_size = 8 << 20;
  options.level_compaction_dynamic_level_bytes = true;
  options.target_file_size_base = 256 << 20;
  options.max_bytes_for_level_base = settings.Number("level-base-bytes", 512 << 20);
  options.level0_file_num_compaction_trigger = static_cast<int>(settings.Number("level0-files", 16));
  options.level0_slowdown_writes_trigger = 64;
  options.level0_stop_writes_trigger = 96;
  options.info_log_level = rocksdb::InfoLogLevel::ERROR_LEVEL;
  if (settings.Number("statistics", 0) != 0) options.statistics = rocksdb::CreateDBStatistics();
  return options;
}

// ---- tables

void ToBigEndian(std::vector<Id>& ids, size_t begin, size_t end) {
  for (size_t index = begin; index < end; ++index) {
    ids[index].high = __builtin_bswap64(ids[index].high);
    ids[index].low = __builtin_bswap64(ids[index].low);
  }
}

Slice KeyOf(const Id& big_endian) { return {reinterpret_cast<const char*>(&big_endian), sizeof(Id)}; }

// Writes sorted big-endian ids [begin, end) as one table.
void WriteTable(const rocksdb::Options& options, const std::string& path, const std::vector<Id>& ids, size_t begin,
                size_t end) {
  rocksdb::SstFileWriter writer(rocksdb::EnvOptions(), options);
  Check(writer.Open(path));
  for (size_t index = begin; index < end; ++index) Check(writer.Put(KeyOf(ids[index]), Slice()));
  Check(writer.Finish());
}

// Sorts on all cores: by the highest bits first, then each part alone.
void Sort(std::vector<Id>& ids, uint64_t lowest, uint64_t width, size_t threads) {
  constexpr size_t kParts = 64;
  const auto part_of = [&](const Id& id) {
    return static_cast<size_t>((static_cast<unsigned __int128>(id.high - lowest) * kParts) / width);
  };
  std::vector<size_t> ends(kParts, 0);
  for (const Id& id : ids) ++ends[part_of(id)];
  size_t sum = 0;
  std::vector<size_t> begins(kParts);
  for (size_t part = 0; part < kParts; ++part) {
    begins[part] = sum;
    sum += ends[part];
    ends[part] = begins[part];
  }
  std::vector<Id> parted(ids.size());
  for (const Id& id : ids) parted[ends[part_of(id)]++] = id;
  OnThreads(threads, kParts, [&](size_t part) {
    std::sort(parted.begin() + begins[part], parted.begin() + ends[part]);
  });
  ids.swap(parted);
}

rocksdb::IngestExternalFileOptions IngestOptions() {
  rocksdb::IngestExternalFileOptions ingest;
  ingest.move_files = true;
  ingest.snapshot_consistency = false;
  ingest.write_global_seqno = false;
  return ingest;
}

// ---- load

int Load(const Settings& settings) {
  constexpr uint64_t kPassKeys = 32'000'000;
  constexpr size_t kTableKeys = 4'000'000;
  const std::string state = settings.Text("state", "");
  const uint64_t count = settings.Number("keys", 0);
  const Keys keys{settings.Number("state-seed", 0), 0, count};
  const rocksdb::Options options = OptionsOf(settings);
  std::filesystem::create_directories(state + "/tables");
  std::vector<std::string> tables;
  const uint64_t passes = std::max<uint64_t>(1, (count + kPassKeys - 1) / kPassKeys);
  const uint64_t width = UINT64_MAX / passes + 1;  // 0 stands for all of 2^64 when there is one pass.
  for (uint64_t pass = 0; pass < passes; ++pass) {
    const size_t threads = std::max(1u, std::thread::hardware_concurrency());
    const uint64_t lowest = pass * width;
    std::vector<std::vector<Id>> found(threads);
    OnThreads(threads, threads, [&](size_t thread) {
      for (uint64_t number = thread; number < count; number += threads) {
        const Id id = keys.Of(number);
        if (passes == 1 || id.high - lowest < width) found[thread].push_back(id);
      }
    });
    std::vector<Id> ids;
    for (auto& part : found) {
      ids.insert(ids.end(), part.begin(), part.end());
      std::vector<Id>().swap(part);
    }
    Sort(ids, lowest, passes == 1 ? UINT64_MAX : width, threads);
    ToBigEndian(ids, 0, ids.size());
    const size_t pieces = (ids.size() + kTableKeys - 1) / kTableKeys;
    const size_t first = tables.size();
    for (size_t piece = 0; piece < pieces; ++piece) {
      tables.push_back(state + "/tables/" + std::to_string(first + piece) + ".sst");
    }
    OnThreads(threads, pieces, [&](size_t piece) {
      const size_t begin = piece * kTableKeys;
      WriteTable(options, tables[first + piece], ids, begin, std::min(ids.size(), begin + kTableKeys));
    });
    std::fprintf(stderr, "rocksdb: loaded part %lu of %lu\n", pass + 1, passes);
  }
  rocksdb::DB* opened = nullptr;
  Check(rocksdb::DB::Open(options, state + "/base", &opened));
  std::unique_ptr<rocksdb::DB> db(opened);
  if (!tables.empty()) Check(db->IngestExternalFile(tables, IngestOptions()));
  Check(db->Close());
  std::ofstream(state + "/loaded") << count << "\n";
  return 0;
}

// ---- run

struct Batch {
  std::vector<Id> ids;
  uint64_t found = 0;
};

// Marks what the database holds of sorted, distinct ids.
void LookUp(rocksdb::DB* db, const std::vector<Id>& ids, std::vector<char>& held, const Settings& settings) {
  const size_t chunk_keys = settings.Number("chunk-keys", 512);
  // RocksDB works on 32 keys at once; more in one call only means lists on the heap.
  const size_t get_keys = settings.Number("get-keys", 32);
  const size_t chunks = (ids.size() + chunk_keys - 1) / chunk_keys;
  rocksdb::ReadOptions read;
  read.verify_checksums = true;
  read.fill_cache = settings.Number("fill-cache", 1) != 0;
  OnThreads(settings.Number("threads", 16), chunks, [&](size_t chunk) {
    thread_local std::vector<Slice> keys;
    thread_local std::vector<rocksdb::PinnableSlice> values;
    thread_local std::vector<Status> statuses;
    const size_t chunk_end = std::min(ids.size(), (chunk + 1) * chunk_keys);
    for (size_t begin = chunk * chunk_keys; begin < chunk_end; begin += get_keys) {
      const size_t count = std::min(chunk_end - begin, get_keys);
      keys.resize(count);
      values.resize(count);
      statuses.resize(count);
      for (size_t index = 0; index < count; ++index) keys[index] = KeyOf(ids[begin + index]);
      db->MultiGet(read, db->DefaultColumnFamily(), count, keys.data(), values.data(), statuses.data(), true);
      for (size_t index = 0; index < count; ++index) {
        if (!statuses[index].ok() && !statuses[index].IsNotFound()) Check(statuses[index]);
        held[begin + index] = statuses[index].ok();
        values[index].Reset();
      }
    }
  });
}

// One batch: what the program does with the keys of a microbatch. Gives the number of repeats.
uint64_t Deduplicate(rocksdb::DB* db, const rocksdb::Options& options, const std::string& folder, uint64_t number,
                     std::vector<Id>& ids, const Settings& settings) {
  const size_t cores = std::max(1u, std::thread::hardware_concurrency());
  const size_t events = ids.size();
  Sort(ids, 0, UINT64_MAX, cores);
  ids.erase(std::unique(ids.begin(), ids.end()), ids.end());
  ToBigEndian(ids, 0, ids.size());
  std::vector<char> held(ids.size());
  LookUp(db, ids, held, settings);
  size_t kept = 0;
  for (size_t index = 0; index < ids.size(); ++index) {
    if (!held[index]) ids[kept++] = ids[index];
  }
  ids.resize(kept);
  if (kept > 0) {
    // One sorted run, cut in as many tables as there are cores: each is built by one thread.
    const size_t pieces = std::min<size_t>(cores, kept);
    std::vector<std::string> tables;
    for (size_t piece = 0; piece < pieces; ++piece) {
      tables.push_back(folder + "/" + std::to_string(number) + "-" + std::to_string(piece) + ".sst");
    }
    OnThreads(pieces, pieces, [&](size_t piece) {
      WriteTable(options, tables[piece], ids, kept * piece / pieces, kept * (piece + 1) / pieces);
    });
    Check(db->IngestExternalFile(tables, IngestOptions()));
  }
  return events - kept;
}

int Run(const Settings& settings) {
  const std::string state = settings.Text("state", "");
  const std::string folder = state + "/run";
  const rocksdb::Options options = OptionsOf(settings);
  std::filesystem::remove_all(folder);
  std::filesystem::remove_all(state + "/new");
  std::filesystem::create_directories(state + "/new");
  {
    rocksdb::DB* opened = nullptr;
    rocksdb::Options links = options;
    links.disable_auto_compactions = true;
    Check(rocksdb::DB::Open(links, state + "/base", &opened));
    std::unique_ptr<rocksdb::DB> base(opened);
    rocksdb::Checkpoint* made = nullptr;
    Check(rocksdb::Checkpoint::Create(base.get(), &made));
    std::unique_ptr<rocksdb::Checkpoint> checkpoint(made);
    Check(checkpoint->CreateCheckpoint(folder));
  }
  const uint64_t prepared = settings.Number("keys", 0);
  const uint64_t batch_events = settings.Number("batch", 1'000'000);
  Stream stream{{settings.Number("state-seed", 0), settings.Number("run-seed", 0), prepared},
                settings.Text("load", "mix") == "worst",
                prepared,
                0};

  const uint64_t read_before = ProcNumber("io", "read_bytes:");
  const double opening = Now();
  rocksdb::DB* opened = nullptr;
  Check(rocksdb::DB::Open(options, folder, &opened));
  std::unique_ptr<rocksdb::DB> db(opened);
  const double open_seconds = Now() - opening;
  const uint64_t open_read_bytes = ProcNumber("io", "read_bytes:") - read_before;

  std::vector<double> seconds;
  uint64_t found = 0;
  uint64_t expected = 0;
  double cpu_seconds = 0;
  const uint64_t read_bytes_before = ProcNumber("io", "read_bytes:");
  const uint64_t reads_before = ProcNumber("io", "syscr:");
  const uint64_t batches = settings.Number("batches", 50);
  for (uint64_t number = 0; number < batches; ++number) {
    std::vector<Id> ids(batch_events);
    for (Id& id : ids) {
      bool is_new = false;
      id = stream.Next(&is_new);
      expected += !is_new;
    }
    const double cpu_before = CpuSeconds();
    const double begun = Now();
    found += Deduplicate(db.get(), options, state + "/new", number, ids, settings);
    seconds.push_back(Now() - begun);
    cpu_seconds += CpuSeconds() - cpu_before;
    std::fprintf(stderr, "rocksdb: batch %lu of %lu, %.2f M events/s\n", number + 1, batches,
                 batch_events / seconds.back() / 1e6);
  }

  uint64_t disk_bytes = 0;
  db->GetAggregatedIntProperty("rocksdb.total-sst-files-size", &disk_bytes);
  std::printf("{\"seconds\":[");
  for (size_t index = 0; index < seconds.size(); ++index) std::printf("%s%.6f", index ? "," : "", seconds[index]);
  std::printf("],\"found\":%lu,\"expected\":%lu,\"keys\":%lu,\"disk_bytes\":%lu,\"open_seconds\":%.4f,", found,
              expected, stream.next_key, disk_bytes, open_seconds);
  std::printf("\"open_read_bytes\":%lu,\"cpu_seconds\":%.3f,\"peak_rss_bytes\":%lu,\"read_bytes\":%lu,"
              "\"reads\":%lu,\"files_per_level\":[",
              open_read_bytes, cpu_seconds, ProcNumber("status", "VmHWM:") * 1024,
              ProcNumber("io", "read_bytes:") - read_bytes_before, ProcNumber("io", "syscr:") - reads_before);
  for (int level = 0; level < db->NumberLevels(); ++level) {
    std::string files;
    db->GetProperty("rocksdb.num-files-at-level" + std::to_string(level), &files);
    std::printf("%s%s", level ? "," : "", files.c_str());
  }
  std::printf("]}\n");
  if (options.statistics) std::fprintf(stderr, "%s\n", options.statistics->ToString().c_str());
  Check(db->Close());
  db.reset();
  std::filesystem::remove_all(folder);
  std::filesystem::remove_all(state + "/new");
  return 0;
}

}  // namespace

int main(int count, char** words) {
  Settings settings;
  for (int index = 2; index + 1 < count; index += 2) settings.values[words[index] + 2] = words[index + 1];
  const std::string command = count > 1 ? words[1] : "";
  if (command == "load") return Load(settings);
  if (command == "run") return Run(settings);
  std::fprintf(stderr, "usage: anchor load|run --state DIR --keys N --state-seed S ...\n");
  return 2;
}
