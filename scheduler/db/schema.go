package db

// migrations lead from one version of the schema to the next; the database's
// user_version counts those that were performed. One that was released is never
// changed: a new one is appended. docs/database.md describes the tables; a change
// here is a change there.
//
// Times are UNIX milliseconds in columns that end in _ms, unless said otherwise.
var migrations = []string{
	`
CREATE TABLE machines (
	id       INTEGER PRIMARY KEY,
	name     TEXT NOT NULL UNIQUE,
	first_ms INTEGER NOT NULL,
	last_ms  INTEGER NOT NULL
) STRICT;
CREATE TABLE cycles (
	id          INTEGER PRIMARY KEY,
	machine     INTEGER NOT NULL REFERENCES machines ON DELETE CASCADE,
	time_ms     INTEGER NOT NULL,
	took_ms     INTEGER NOT NULL,
	guest_us    INTEGER NOT NULL,
	processes   INTEGER NOT NULL,
	connections INTEGER NOT NULL,
	changes     INTEGER NOT NULL,
	dry         INTEGER NOT NULL,
	error       TEXT NOT NULL
) STRICT;
CREATE INDEX cycles_machine ON cycles (machine, time_ms);
CREATE INDEX cycles_time ON cycles (time_ms);
CREATE TABLE host_samples (
	cycle          INTEGER PRIMARY KEY REFERENCES cycles ON DELETE CASCADE,
	vcpus          INTEGER NOT NULL,
	cpu_use        REAL NOT NULL,
	cpu_wait       REAL NOT NULL,
	cpu_weight     INTEGER NOT NULL,
	cpu_quota      REAL NOT NULL,
	affinity       TEXT NOT NULL,
	memory_bytes   INTEGER NOT NULL,
	target_bytes   INTEGER NOT NULL,
	actual_bytes   INTEGER NOT NULL,
	memory_use     REAL NOT NULL,
	disk_bytes     INTEGER NOT NULL,
	disk_ops       INTEGER NOT NULL,
	net_bytes      INTEGER NOT NULL,
	net_packets    INTEGER NOT NULL,
	host_cpu_idle  REAL NOT NULL,
	host_available INTEGER NOT NULL
) STRICT;
CREATE TABLE processes (
	id       INTEGER PRIMARY KEY,
	machine  INTEGER NOT NULL REFERENCES machines ON DELETE CASCADE,
	boot     TEXT NOT NULL,
	pid      INTEGER NOT NULL,
	start_ms INTEGER NOT NULL,
	ppid     INTEGER NOT NULL,
	name     TEXT NOT NULL,
	command  TEXT NOT NULL,
	uid      INTEGER NOT NULL,
	user     TEXT NOT NULL,
	first_ms INTEGER NOT NULL,
	last_ms  INTEGER NOT NULL,
	UNIQUE (machine, boot, pid, start_ms)
) STRICT;
CREATE INDEX processes_last ON processes (last_ms);
CREATE TABLE process_samples (
	cycle     INTEGER NOT NULL REFERENCES cycles ON DELETE CASCADE,
	process   INTEGER NOT NULL REFERENCES processes ON DELETE CASCADE,
	state     TEXT NOT NULL,
	user_ms   INTEGER NOT NULL,
	system_ms INTEGER NOT NULL,
	rss_bytes INTEGER NOT NULL,
	threads   INTEGER NOT NULL,
	nice      INTEGER NOT NULL,
	policy    INTEGER NOT NULL,
	class     TEXT NOT NULL,
	affinity  TEXT NOT NULL,
	talks     INTEGER NOT NULL,
	PRIMARY KEY (cycle, process)
) STRICT, WITHOUT ROWID;
CREATE INDEX process_samples_process ON process_samples (process);
CREATE TABLE connections (
	id       INTEGER PRIMARY KEY,
	cycle    INTEGER NOT NULL REFERENCES cycles ON DELETE CASCADE,
	process  INTEGER REFERENCES processes ON DELETE SET NULL,
	protocol TEXT NOT NULL,
	local    TEXT NOT NULL,
	remote   TEXT NOT NULL,
	state    TEXT NOT NULL,
	rx_bytes INTEGER NOT NULL,
	tx_bytes INTEGER NOT NULL
) STRICT;
CREATE INDEX connections_cycle ON connections (cycle);
CREATE INDEX connections_process ON connections (process);
CREATE TABLE actions (
	id      INTEGER PRIMARY KEY,
	machine INTEGER NOT NULL REFERENCES machines ON DELETE CASCADE,
	time_ms INTEGER NOT NULL,
	pid     INTEGER NOT NULL,
	name    TEXT NOT NULL,
	rule    TEXT NOT NULL,
	before  TEXT NOT NULL,
	after   TEXT NOT NULL,
	why     TEXT NOT NULL,
	dry     INTEGER NOT NULL,
	error   TEXT NOT NULL
) STRICT;
CREATE INDEX actions_machine ON actions (machine, time_ms);
CREATE INDEX actions_time ON actions (time_ms);
CREATE TABLE orders (
	id        INTEGER PRIMARY KEY,
	machine   INTEGER NOT NULL REFERENCES machines ON DELETE CASCADE,
	resource  TEXT NOT NULL,
	opened_ms INTEGER NOT NULL,
	closed_ms INTEGER NOT NULL,
	state     TEXT NOT NULL,
	before    REAL NOT NULL,
	after     REAL NOT NULL,
	use_before REAL NOT NULL,
	use_after  REAL NOT NULL,
	why       TEXT NOT NULL
) STRICT;
CREATE INDEX orders_machine ON orders (machine, opened_ms);
CREATE TABLE service_states (
	id       INTEGER PRIMARY KEY,
	time_ms  INTEGER NOT NULL,
	service  TEXT NOT NULL,
	machine  TEXT NOT NULL,
	previous TEXT NOT NULL,
	state    TEXT NOT NULL,
	why      TEXT NOT NULL
) STRICT;
CREATE INDEX service_states_time ON service_states (time_ms);
CREATE TABLE decisions (
	id      INTEGER PRIMARY KEY,
	time_ms INTEGER NOT NULL,
	machine TEXT NOT NULL,
	source  TEXT NOT NULL,
	kind    TEXT NOT NULL,
	before  TEXT NOT NULL,
	after   TEXT NOT NULL,
	why     TEXT NOT NULL,
	numbers TEXT NOT NULL
) STRICT;
CREATE INDEX decisions_machine ON decisions (machine, time_ms);
CREATE INDEX decisions_time ON decisions (time_ms);
CREATE TABLE needs (
	machine    TEXT NOT NULL,
	resource   TEXT NOT NULL,
	minimum    REAL NOT NULL,
	typical    REAL NOT NULL,
	peak       REAL NOT NULL,
	updated_ms INTEGER NOT NULL,
	PRIMARY KEY (machine, resource)
) STRICT, WITHOUT ROWID;
CREATE VIEW process_history AS
	SELECT c.time_ms, m.name AS machine, p.pid, p.start_ms, p.name, p.command, p.user, s.state, s.class, s.nice, s.policy,
		s.user_ms + s.system_ms AS cpu_ms, s.rss_bytes, s.threads, s.talks
	FROM process_samples s JOIN cycles c ON c.id = s.cycle JOIN processes p ON p.id = s.process JOIN machines m ON m.id = c.machine;
CREATE VIEW action_history AS
	SELECT a.id, a.time_ms, m.name AS machine, a.pid, a.name, a.rule, a.before, a.after, a.why, a.dry, a.error
	FROM actions a JOIN machines m ON m.id = a.machine;
CREATE VIEW order_history AS
	SELECT o.id, m.name AS machine, o.resource, o.opened_ms, o.closed_ms, o.state, o.before, o.after, o.use_before, o.use_after, o.why
	FROM orders o JOIN machines m ON m.id = o.machine;
`,
	// What the scheduler decided, with what became of it. Needs, which nobody wrote
	// before, are forgotten like other rows.
	`
ALTER TABLE decisions ADD COLUMN run INTEGER NOT NULL DEFAULT 0;
ALTER TABLE decisions ADD COLUMN number INTEGER NOT NULL DEFAULT 0;
ALTER TABLE decisions ADD COLUMN peer TEXT NOT NULL DEFAULT '';
ALTER TABLE decisions ADD COLUMN resource TEXT NOT NULL DEFAULT '';
ALTER TABLE decisions ADD COLUMN amount REAL NOT NULL DEFAULT 0;
ALTER TABLE decisions ADD COLUMN outcome TEXT NOT NULL DEFAULT '';
ALTER TABLE decisions ADD COLUMN measured TEXT NOT NULL DEFAULT '';
CREATE INDEX decisions_peer ON decisions (peer, time_ms) WHERE peer <> '';
CREATE UNIQUE INDEX decisions_number ON decisions (source, run, number) WHERE number > 0;
DROP TABLE needs;
CREATE TABLE needs (
	machine    TEXT NOT NULL,
	resource   TEXT NOT NULL,
	minimum    REAL NOT NULL,
	typical    REAL NOT NULL,
	peak       REAL NOT NULL,
	class      TEXT NOT NULL,
	updated_ms INTEGER NOT NULL,
	PRIMARY KEY (machine, resource)
) STRICT;
CREATE INDEX needs_updated ON needs (updated_ms);
`,
}

// aged are the tables whose rows are forgotten, with the column of their time and
// the order in which they are: what refers to them goes with them.
var aged = []struct{ table, time string }{
	{"cycles", "time_ms"},
	{"processes", "last_ms"},
	{"actions", "time_ms"},
	{"orders", "opened_ms"},
	{"service_states", "time_ms"},
	{"decisions", "time_ms"},
	{"needs", "updated_ms"},
}
