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
}

// AddDecisions records decisions.
func (d *DB) AddDecisions(ctx context.Context, decisions ...Decision) error {
	return d.Write(ctx, func(tx *sql.Tx) error {
		for _, x := range decisions {
			if _, err := tx.ExecContext(ctx, `INSERT INTO decisions (time_ms, machine, source, kind, before, after, why, numbers) VALUES (?,?,?,?,?,?,?,?)`,
				x.Time.UnixMilli(), x.Machine, x.Source, x.Kind, x.Before, x.After, x.Why, x.Numbers); err != nil {
				return err
			}
		}
		return nil
	})
}

// Need is what a machine needs of a resource, in the resource's unit (S2.5).
type Need struct {
	Machine, Resource      string
	Minimum, Typical, Peak float64
	Updated                time.Time
}

// SetNeeds records needs in place of those known of the same machine and resource.
func (d *DB) SetNeeds(ctx context.Context, needs ...Need) error {
	return d.Write(ctx, func(tx *sql.Tx) error {
		for _, n := range needs {
			if _, err := tx.ExecContext(ctx, `INSERT OR REPLACE INTO needs (machine, resource, minimum, typical, peak, updated_ms) VALUES (?,?,?,?,?,?)`,
				n.Machine, n.Resource, n.Minimum, n.Typical, n.Peak, n.Updated.UnixMilli()); err != nil {
				return err
			}
		}
		return nil
	})
}

// Needs are those of all machines, in the machines' order.
func (d *DB) Needs(ctx context.Context) ([]Need, error) {
	var needs []Need
	err := d.Query(ctx, "SELECT machine, resource, minimum, typical, peak, updated_ms FROM needs ORDER BY machine, resource", nil, func(_ []string, r []any) error {
		var n Need
		var ms int64
		if err := scan(r, &n.Machine, &n.Resource, &n.Minimum, &n.Typical, &n.Peak, &ms); err != nil {
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
