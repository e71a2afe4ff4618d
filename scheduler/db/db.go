// Package db is the embedded database of what machines did and what was done to
// them (S4.4): a SQLite file that rules, the scheduler and people ask, with history,
// bounded in age and size, that survives kill -9. docs/database.md describes the
// tables.
//
// It is not for `gondola run`: linking it in costs a program some milliseconds of
// start-up.
package db

import (
	"cmp"
	"context"
	"database/sql"
	"errors"
	"fmt"
	"io/fs"
	"net/url"
	"os"
	"path/filepath"
	"sync"
	"time"

	"golang.org/x/sys/unix"
	"modernc.org/sqlite"
	sqlite3 "modernc.org/sqlite/lib"
)

// Errors, for errors.Is. Those of SQLite that are none of these stay as they are.
var (
	// ErrLocked: another process held the database for longer than Options.Busy.
	ErrLocked = errors.New("the database is locked")
	// ErrFull: the disk is full, or the database has reached Options.MaxBytes with
	// what may not be forgotten.
	ErrFull = errors.New("the database or its disk is full")
	// ErrDamaged: the file is no database, or not one that can be read.
	ErrDamaged = errors.New("the database is damaged")
	// ErrNewer: a later gondola wrote the database.
	ErrNewer = errors.New("the database is from a later gondola")
	// ErrForeign: the file is another program's database.
	ErrForeign = errors.New("the database is not gondola's")
	// ErrOld: an earlier gondola wrote the database, and it was to be read only.
	ErrOld = errors.New("the database is from an earlier gondola")
	// ErrMissing: there is no database yet, and it was to be read only.
	ErrMissing = errors.New("there is no database yet")
)

// applicationID is in the header of gondola's databases: "gndl".
const applicationID = 0x676e646c

// Options of a database. The zero value works.
type Options struct {
	// ReadOnly opens for questions only: nothing is made, changed or moved aside.
	ReadOnly bool
	// Retention is how long rows are kept (default 14 days).
	Retention time.Duration
	// MaxBytes bounds the file's size; the oldest rows go when it is reached
	// (default 256 MiB, at least 1 MiB).
	MaxBytes int64
	// Busy is how long to wait for other processes (default 5 s).
	Busy time.Duration
	// Say is told what people should know: a damaged database moved aside.
	Say func(string)
	// Now is the clock (default time.Now).
	Now func() time.Time
}

func (o Options) withDefaults() Options {
	o.Retention = cmp.Or(o.Retention, 14*24*time.Hour)
	o.MaxBytes = max(cmp.Or(o.MaxBytes, 256<<20), 1<<20)
	o.Busy = cmp.Or(o.Busy, 5*time.Second)
	if o.Say == nil {
		o.Say = func(string) {}
	}
	if o.Now == nil {
		o.Now = time.Now
	}
	return o
}

// DB is an open database. Its methods may be called from several goroutines.
type DB struct {
	path string
	o    Options

	began time.Time // with the monotonic clock

	writing chan struct{} // has room for the one that writes

	mu  sync.RWMutex // held for writing while a damaged file is replaced
	sql *sql.DB
}

// DefaultPath is gondola/gondola.db in $XDG_STATE_HOME or ~/.local/state.
func DefaultPath() (string, error) {
	state := os.Getenv("XDG_STATE_HOME")
	if !filepath.IsAbs(state) {
		home, err := os.UserHomeDir()
		if err != nil {
			return "", fmt.Errorf("where is the state directory: set XDG_STATE_HOME: %w", err)
		}
		state = filepath.Join(home, ".local", "state")
	}
	return filepath.Join(state, "gondola", "gondola.db"), nil
}

// Open opens the database at path, makes it if there is none, and brings it to this
// gondola's schema. A damaged one is renamed to path.damaged-TIME, which
// Options.Say is told, and a new one begun; with ReadOnly it is ErrDamaged. One of
// a later gondola is refused with ErrNewer, and stays as it is.
func Open(ctx context.Context, path string, o Options) (*DB, error) {
	d := &DB{path: path, o: o.withDefaults(), writing: make(chan struct{}, 1)}
	d.began = d.o.Now()
	if err := d.open(ctx); err != nil {
		return nil, fmt.Errorf("%s: %w", path, err)
	}
	return d, nil
}

// Path is the file's.
func (d *DB) Path() string { return d.path }

// Close closes the database.
func (d *DB) Close() error {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.sql.Close()
}

// open opens or replaces the file. With d.mu, or before d is known.
func (d *DB) open(ctx context.Context) error {
	if d.o.ReadOnly {
		if _, err := os.Stat(d.path); errors.Is(err, fs.ErrNotExist) {
			return fmt.Errorf("%w: gondola rules apply and gondola sched run make it", ErrMissing)
		}
		err := d.connect(ctx, true)
		if err == nil {
			_, err = d.version(ctx)
		}
		return d.orClose(err)
	}
	if err := os.MkdirAll(filepath.Dir(d.path), 0o700); err != nil {
		return err
	}
	// Only one process looks, moves aside and migrates at a time.
	unlock, err := lockFile(ctx, d.path+".lock", d.o.Busy)
	if err != nil {
		return err
	}
	defer unlock()
	err = d.orClose(d.prepare(ctx))
	if !errors.Is(err, ErrDamaged) {
		return err
	}
	aside, merr := moveAside(d.path, d.o.Now())
	if merr != nil {
		return fmt.Errorf("%w; and it cannot be moved aside: %w", err, merr)
	}
	d.o.Say(fmt.Sprintf("%s: %v; it is now %s, and a new one is begun", d.path, err, aside))
	return d.orClose(d.prepare(ctx))
}

func (d *DB) orClose(err error) error {
	if err != nil && d.sql != nil {
		return errors.Join(err, d.sql.Close())
	}
	return err
}

// lockFile takes the lock of a file, which it makes, for at most so long.
func lockFile(ctx context.Context, path string, wait time.Duration) (unlock func(), err error) {
	f, err := os.OpenFile(path, os.O_CREATE|os.O_RDWR, 0o600)
	if err != nil {
		return nil, err
	}
	ctx, cancel := context.WithTimeout(ctx, wait)
	defer cancel()
	for {
		err := unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB)
		if err == nil {
			return func() { f.Close() }, nil
		}
		if !errors.Is(err, unix.EWOULDBLOCK) && !errors.Is(err, unix.EINTR) {
			f.Close()
			return nil, fmt.Errorf("lock %s: %w", path, err)
		}
		select {
		case <-ctx.Done():
			f.Close()
			return nil, fmt.Errorf("%w: another process holds %s; try again", ErrLocked, path)
		case <-time.After(10 * time.Millisecond):
		}
	}
}

// moveAside renames a database and what SQLite keeps beside it.
func moveAside(path string, now time.Time) (string, error) {
	aside := path + ".damaged-" + now.UTC().Format("20060102T150405.000")
	if err := os.Rename(path, aside); err != nil {
		return "", err
	}
	for _, ext := range []string{"-wal", "-shm"} {
		if err := os.Rename(path+ext, aside+ext); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return "", err
		}
	}
	return aside, nil
}

// connect opens the file with SQLite.
func (d *DB) connect(ctx context.Context, readOnly bool) error {
	q := url.Values{"_txlock": {"immediate"}, "_pragma": {
		fmt.Sprintf("busy_timeout(%d)", d.o.Busy.Milliseconds()),
		"foreign_keys(1)",
	}}
	if readOnly {
		q.Set("mode", "ro")
	} else {
		q.Set("mode", "rw")
		q.Add("_pragma", "synchronous(normal)")
		q.Add("_pragma", "auto_vacuum(incremental)")
		q.Add("_pragma", "journal_mode(wal)")
		q.Add("_pragma", "journal_size_limit(4194304)")
		q.Add("_pragma", fmt.Sprintf("max_page_count(%d)", d.o.MaxBytes/pageSize))
		// SQLite would let others read a file that it makes.
		f, err := os.OpenFile(d.path, os.O_CREATE|os.O_RDWR, 0o600)
		if err != nil {
			return err
		}
		if err := f.Close(); err != nil {
			return err
		}
	}
	u := url.URL{Scheme: "file", Opaque: (&url.URL{Path: d.path}).EscapedPath(), RawQuery: q.Encode()}
	db, err := sql.Open("sqlite", u.String())
	if err != nil {
		return err
	}
	d.sql = db
	if !readOnly {
		db.SetMaxOpenConns(4)
		return classify(db.PingContext(ctx))
	}
	db.SetMaxOpenConns(1)
	return d.attachable(ctx, 0)
}

// attachable limits how many other files the one connection of a reader may attach:
// it could write to them.
func (d *DB) attachable(ctx context.Context, n int) error {
	c, err := d.sql.Conn(ctx)
	if err != nil {
		return classify(err)
	}
	_, err = sqlite.Limit(c, sqlite3.SQLITE_LIMIT_ATTACHED, n)
	return errors.Join(classify(err), c.Close())
}

// pageSize is SQLite's default.
const pageSize = 4096

// prepare opens, checks and migrates the file, which it makes.
func (d *DB) prepare(ctx context.Context) error {
	// What is not ours or not for us is not touched.
	if st, err := os.Stat(d.path); err == nil && st.Size() > 0 {
		if err := d.connect(ctx, true); err != nil {
			return err
		}
		if _, err := d.version(ctx); err != nil {
			return err
		}
		if err := d.sql.Close(); err != nil {
			return err
		}
	}
	if err := d.connect(ctx, false); err != nil {
		return err
	}
	v, err := d.version(ctx)
	if err != nil {
		return err
	}
	var said string
	if err := d.sql.QueryRowContext(ctx, "PRAGMA quick_check(1)").Scan(&said); err != nil {
		return classify(err)
	}
	if said != "ok" {
		return fmt.Errorf("%w: %s", ErrDamaged, said)
	}
	if v == len(migrations) {
		return nil
	}
	tx, err := d.sql.BeginTx(ctx, nil)
	if err != nil {
		return classify(err)
	}
	defer tx.Rollback() // nothing after Commit
	for ; v < len(migrations); v++ {
		if _, err := tx.ExecContext(ctx, migrations[v]); err != nil {
			return fmt.Errorf("bringing the database to version %d: %w", v+1, classify(err))
		}
	}
	// Pragmas take no parameters.
	if _, err := tx.ExecContext(ctx, fmt.Sprintf("PRAGMA user_version = %d; PRAGMA application_id = %d", v, applicationID)); err != nil {
		return classify(err)
	}
	return classify(tx.Commit())
}

// version is how many migrations the file has seen.
func (d *DB) version(ctx context.Context) (v int, err error) {
	var id, tables int
	for _, q := range []struct {
		sql string
		to  *int
	}{{"PRAGMA user_version", &v}, {"PRAGMA application_id", &id}, {"SELECT count(*) FROM sqlite_schema", &tables}} {
		if err := d.sql.QueryRowContext(ctx, q.sql).Scan(q.to); err != nil {
			return 0, classify(err)
		}
	}
	switch {
	case id != applicationID && tables > 0:
		return 0, fmt.Errorf("%w: it has %d tables and application id %#x; choose another file", ErrForeign, tables, id)
	case v > len(migrations):
		return 0, fmt.Errorf("%w: its schema is version %d, this gondola knows %d; use the later gondola, or another file", ErrNewer, v, len(migrations))
	case tables == 0 && d.o.ReadOnly: // who makes it has not got any further yet
		return 0, fmt.Errorf("%w: the file is there, with nothing in it", ErrMissing)
	case v < len(migrations) && d.o.ReadOnly:
		return 0, fmt.Errorf("%w: its schema is version %d of %d; gondola rules apply or gondola sched run brings it up to date", ErrOld, v, len(migrations))
	}
	return v, nil
}

// classify adds what an error of SQLite means.
func classify(err error) error {
	var e *sqlite.Error
	if !errors.As(err, &e) {
		return err
	}
	for _, k := range []struct {
		code int
		err  error
	}{
		{sqlite3.SQLITE_BUSY, ErrLocked}, {sqlite3.SQLITE_LOCKED, ErrLocked}, {sqlite3.SQLITE_FULL, ErrFull},
		{sqlite3.SQLITE_CORRUPT, ErrDamaged}, {sqlite3.SQLITE_NOTADB, ErrDamaged},
	} {
		if e.Code()&0xff == k.code { // the rest is an extended code
			return fmt.Errorf("%w: %w", k.err, err)
		}
	}
	return err
}

// Write performs f in one transaction, which is committed if f returns nil. When the
// database is full, the oldest tenth of its rows is forgotten and f called once more;
// when it turns out to be damaged it is replaced as by Open, and f called once more.
// f must not keep tx.
func (d *DB) Write(ctx context.Context, f func(*sql.Tx) error) error {
	err := d.write(ctx, f)
	switch {
	case errors.Is(err, ErrFull):
		if ferr := d.forgetTenth(ctx); ferr != nil {
			return fmt.Errorf("%s: %w; %w", d.path, err, ferr)
		}
		err = d.write(ctx, f)
	case errors.Is(err, ErrDamaged):
		if rerr := d.replace(ctx); rerr != nil {
			return fmt.Errorf("%s: %w; %w", d.path, err, rerr)
		}
		err = d.write(ctx, f)
	}
	if err != nil {
		return fmt.Errorf("%s: %w", d.path, err)
	}
	return nil
}

func (d *DB) write(ctx context.Context, f func(*sql.Tx) error) error {
	// One after the other within a process: SQLite's own waiting is by chance, and
	// for other processes.
	select {
	case d.writing <- struct{}{}:
		defer func() { <-d.writing }()
	case <-ctx.Done():
		return fmt.Errorf("%w: others are writing to it: %w", ErrLocked, context.Cause(ctx))
	}
	d.mu.RLock()
	defer d.mu.RUnlock()
	tx, err := d.sql.BeginTx(ctx, nil)
	if err != nil {
		return classify(err)
	}
	defer tx.Rollback() // nothing after Commit
	if err := f(tx); err != nil {
		return classify(err)
	}
	return classify(tx.Commit())
}

// replace opens anew what turned out to be damaged: somebody may have replaced the
// file already, and else Open's check moves it aside.
func (d *DB) replace(ctx context.Context) error {
	d.mu.Lock()
	defer d.mu.Unlock()
	// The file's state is what is wrong; how it closes changes nothing.
	_ = d.sql.Close()
	return d.open(ctx)
}

// Query asks the database, and calls f for each row. The values are int64, float64,
// string, []byte or nil.
func (d *DB) Query(ctx context.Context, query string, args []any, f func(columns []string, row []any) error) error {
	d.mu.RLock()
	defer d.mu.RUnlock()
	rows, err := d.sql.QueryContext(ctx, query, args...)
	if err != nil {
		return classify(err)
	}
	defer rows.Close()
	columns, err := rows.Columns()
	if err != nil {
		return err
	}
	row := make([]any, len(columns))
	to := make([]any, len(columns))
	for i := range row {
		to[i] = &row[i]
	}
	for rows.Next() {
		if err := rows.Scan(to...); err != nil {
			return classify(err)
		}
		if err := f(columns, row); err != nil {
			return err
		}
	}
	return classify(rows.Err())
}

// now is the time that rows are aged by: the wall clock's when the database was
// opened and what has passed since, so that a clock that jumps forgets nothing.
func (d *DB) now() time.Time { return d.began.Add(d.o.Now().Sub(d.began)) }

// Prune forgets what is older than Options.Retention, in small transactions, and
// gives the room back to the disk. It returns how many rows it removed, those that
// referred to them not counted.
func (d *DB) Prune(ctx context.Context) (removed int64, err error) {
	before := d.now().Add(-d.o.Retention).UnixMilli()
	const batch = 1000
	for _, t := range aged {
		q := fmt.Sprintf("DELETE FROM %[1]s WHERE rowid IN (SELECT rowid FROM %[1]s WHERE %[2]s < ? ORDER BY %[2]s LIMIT %[3]d)", t.table, t.time, batch)
		for n := int64(batch); n == batch; {
			err := d.Write(ctx, func(tx *sql.Tx) error {
				r, err := tx.ExecContext(ctx, q, before)
				if err == nil {
					n, err = r.RowsAffected()
				}
				return err
			})
			if err != nil {
				return removed, err
			}
			removed += n
		}
	}
	return removed, d.shrink(ctx)
}

// shrink gives free pages back to the disk.
func (d *DB) shrink(ctx context.Context) error {
	return d.Query(ctx, "PRAGMA incremental_vacuum", nil, func([]string, []any) error { return nil })
}

// forgetTenth removes the oldest tenth of the rows of every table, in the order in
// which they were written: a clock that was wrong does not matter.
func (d *DB) forgetTenth(ctx context.Context) error {
	return d.write(ctx, func(tx *sql.Tx) error {
		for _, t := range aged {
			q := fmt.Sprintf("DELETE FROM %[1]s WHERE rowid IN (SELECT rowid FROM %[1]s ORDER BY rowid LIMIT (SELECT (count(*)+9)/10 FROM %[1]s))", t.table)
			if _, err := tx.ExecContext(ctx, q); err != nil {
				return err
			}
		}
		return nil
	})
}

// CopyTo writes a copy of the database, as it is now, to a file that is not there yet.
func (d *DB) CopyTo(ctx context.Context, file string) error {
	if _, err := os.Lstat(file); err == nil {
		return fmt.Errorf("%s: %w; choose another name", file, fs.ErrExist)
	}
	d.mu.RLock()
	defer d.mu.RUnlock()
	if d.o.ReadOnly { // the copy is attached
		if err := d.attachable(ctx, 1); err != nil {
			return err
		}
		defer d.attachable(context.WithoutCancel(ctx), 0) // as it was at first
	}
	_, err := d.sql.ExecContext(ctx, "VACUUM INTO ?", file)
	return classify(err)
}
