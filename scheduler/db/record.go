package db

import (
	"context"
	"database/sql"
	"fmt"
	"time"
)

// Decision is something that a part of gondola decided and did (S2.10).
type Decision struct {
	Time    time.Time
	Machine string
	Source  string // "sched", "fleet", …
	Kind    string
	Before  string
	After   string
	Why     string
	Numbers string // JSON, or empty

	// Of those that are measured afterwards: Number counts from 1 within a Run
	// of Source; 0: it has none, and nothing becomes of it.
	Run    int64
	Number int64
	// Peer is the other machine that it concerns, or empty.
	Peer     string
	Resource string
	Amount   float64 // in the resource's unit
	// Outcome is a word for what became of it, Measured its numbers (JSON);
	// empty as long as that is not known.
	Outcome, Measured string
}

// Outcome is what became of a decision.
type Outcome struct {
	Source            string
	Run, Number       int64
	Outcome, Measured string
}

// AddDecisions records decisions.
func (d *DB) AddDecisions(ctx context.Context, decisions ...Decision) error {
	return d.Decide(ctx, decisions, nil)
}

// Decide records decisions, and what became of earlier ones, all or nothing. One whose
// number is there already stays as it was recorded first; an outcome of a decision
// that was forgotten is dropped.
func (d *DB) Decide(ctx context.Context, decisions []Decision, outcomes []Outcome) error {
	return d.Write(ctx, func(tx *sql.Tx) error {
		for _, x := range decisions {
			if _, err := tx.ExecContext(ctx, `INSERT INTO decisions (time_ms, machine, source, kind, before, after, why, numbers, run, number, peer, resource, amount, outcome, measured)
				VALUES (?,?,?,?,?,?,?,?,?,?,?,?,?,?,?) ON CONFLICT DO NOTHING`,
				x.Time.UnixMilli(), x.Machine, x.Source, x.Kind, x.Before, x.After, x.Why, x.Numbers, x.Run, x.Number, x.Peer, x.Resource, x.Amount, x.Outcome, x.Measured); err != nil {
				return err
			}
		}
		for _, x := range outcomes {
			if _, err := tx.ExecContext(ctx, `UPDATE decisions SET outcome = ?, measured = ? WHERE source = ? AND run = ? AND number = ? AND number > 0`,
				x.Outcome, x.Measured, x.Source, x.Run, x.Number); err != nil {
				return err
			}
		}
		return nil
	})
}

const decisionColumns = "time_ms, machine, source, kind, before, after, why, numbers, run, number, peer, resource, amount, outcome, measured"

// Decisions are the latest n of a source (0: all), in the order in which they were
// recorded; those that concern a machine, also as the peer, if its name is not empty.
func (d *DB) Decisions(ctx context.Context, source, machine string, n int) ([]Decision, error) {
	if n <= 0 {
		n = -1 // SQLite's word for no limit
	}
	return d.decisions(ctx, "SELECT "+decisionColumns+" FROM (SELECT id, "+decisionColumns+` FROM decisions
		WHERE source = ?1 AND (?2 = '' OR machine = ?2 OR peer = ?2) ORDER BY id DESC LIMIT ?3) ORDER BY id`, source, machine, n)
}

// LastDecisions are the latest of a source for each machine.
func (d *DB) LastDecisions(ctx context.Context, source string) ([]Decision, error) {
	return d.decisions(ctx, "SELECT "+decisionColumns+" FROM decisions WHERE id IN (SELECT max(id) FROM decisions WHERE source = ?1 GROUP BY machine) ORDER BY machine", source)
}

func (d *DB) decisions(ctx context.Context, query string, args ...any) ([]Decision, error) {
	var list []Decision
	err := d.Query(ctx, query, args, func(_ []string, r []any) error {
		var x Decision
		var ms int64
		if err := scan(r, &ms, &x.Machine, &x.Source, &x.Kind, &x.Before, &x.After, &x.Why, &x.Numbers, &x.Run, &x.Number, &x.Peer, &x.Resource, &x.Amount, &x.Outcome, &x.Measured); err != nil {
			return err
		}
		x.Time = time.UnixMilli(ms)
		list = append(list, x)
		return nil
	})
	return list, err
}

// Need is what a machine needs of a resource, in the resource's unit (S2.5).
type Need struct {
	Machine, Resource      string
	Minimum, Typical, Peak float64
	Class                  string // what it is bound by
	Updated                time.Time
}

// SetNeeds records needs in place of those known of the same machine and resource.
func (d *DB) SetNeeds(ctx context.Context, needs ...Need) error {
	return d.Write(ctx, func(tx *sql.Tx) error {
		for _, n := range needs {
			if _, err := tx.ExecContext(ctx, `INSERT OR REPLACE INTO needs (machine, resource, minimum, typical, peak, class, updated_ms) VALUES (?,?,?,?,?,?,?)`,
				n.Machine, n.Resource, n.Minimum, n.Typical, n.Peak, n.Class, n.Updated.UnixMilli()); err != nil {
				return err
			}
		}
		return nil
	})
}

// Needs are those of all machines, in the machines' order.
func (d *DB) Needs(ctx context.Context) ([]Need, error) {
	var needs []Need
	err := d.Query(ctx, "SELECT machine, resource, minimum, typical, peak, class, updated_ms FROM needs ORDER BY machine, resource", nil, func(_ []string, r []any) error {
		var n Need
		var ms int64
		if err := scan(r, &n.Machine, &n.Resource, &n.Minimum, &n.Typical, &n.Peak, &n.Class, &ms); err != nil {
			return err
		}
		n.Updated = time.UnixMilli(ms)
		needs = append(needs, n)
		return nil
	})
	return needs, err
}

// scan takes a row of Query apart. The tables are strict, so that other types mean
// that somebody else wrote them.
func scan(row []any, to ...any) error {
	for i, v := range row {
		ok := false
		switch p := to[i].(type) {
		case *string:
			*p, ok = v.(string)
		case *int64:
			*p, ok = v.(int64)
		case *float64:
			*p, ok = v.(float64)
		case *bool:
			var n int64
			n, ok = v.(int64)
			*p = n != 0
		}
		if !ok {
			return fmt.Errorf("%w: column %d is %T", ErrDamaged, i, v)
		}
	}
	return nil
}

// machineID is the row of a machine, which is made.
func machineID(ctx context.Context, tx *sql.Tx, name string, ms int64) (id int64, err error) {
	err = tx.QueryRowContext(ctx, `INSERT INTO machines (name, first_ms, last_ms) VALUES (?1, ?2, ?2)
		ON CONFLICT (name) DO UPDATE SET last_ms = max(last_ms, excluded.last_ms) RETURNING id`, name, ms).Scan(&id)
	return id, err
}
