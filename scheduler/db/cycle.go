package db

import (
	"context"
	"database/sql"
	"time"
)

// Cycle is a look at a machine and what was done (S4.4).
type Cycle struct {
	Machine     string
	Boot        string
	Time        time.Time
	Took        time.Duration
	GuestCPU    time.Duration
	Processes   int // in all
	Connections int // in all
	Dry         bool
	Err         string
	Host        *HostSample
	Changed     []Process // that changed since the last cycle
	Sockets     []Connection
	Actions     []Action
}

// HostSample is what the host knew of a machine (S4.3): the columns of host_samples.
type HostSample struct {
	VCPUs                  int
	CPUUse, CPUWait        float64
	CPUWeight              int64
	CPUQuota               float64
	Affinity               string
	Memory, Target, Actual uint64
	MemoryUse              float64
	DiskBytes, DiskOps     uint64
	NetBytes, NetPackets   uint64
	HostCPUIdle            float64
	HostAvailable          uint64
}

// Process is a process and what it was like in a cycle.
type Process struct {
	PID, PPID, UID      int
	StartMS             int64
	Name, Command, User string
	State               string
	UserMS, SystemMS    int64
	RSS                 int64
	Threads             int
	Nice, Policy        int
	Class, Affinity     string
	Talks               bool
}

// Connection is a socket that changed; PID and StartMS are its owner's, PID 0: unknown.
type Connection struct {
	PID                            int
	StartMS                        int64
	Protocol, Local, Remote, State string
	RxBytes, TxBytes               int64
}

// Action is a priority set, or not.
type Action struct {
	PID                            int
	Name, Rule, Before, After, Why string
	Err                            string
}

// AddCycle records a cycle.
func (d *DB) AddCycle(ctx context.Context, c *Cycle) error {
	ms := c.Time.UnixMilli()
	return d.Write(ctx, func(tx *sql.Tx) error {
		machine, err := machineID(ctx, tx, c.Machine, ms)
		if err != nil {
			return err
		}
		var cycle int64
		err = tx.QueryRowContext(ctx, `INSERT INTO cycles (machine, time_ms, took_ms, guest_us, processes, connections, changes, dry, error) VALUES (?,?,?,?,?,?,?,?,?) RETURNING id`,
			machine, ms, c.Took.Milliseconds(), c.GuestCPU.Microseconds(), c.Processes, c.Connections, len(c.Changed), c.Dry, c.Err).Scan(&cycle)
		if err != nil {
			return err
		}
		if h := c.Host; h != nil {
			if _, err := tx.ExecContext(ctx, `INSERT INTO host_samples VALUES (?,?,?,?,?,?,?,?,?,?,?,?,?,?,?,?,?)`, cycle, h.VCPUs, h.CPUUse, h.CPUWait, h.CPUWeight, h.CPUQuota,
				h.Affinity, int64(h.Memory), int64(h.Target), int64(h.Actual), h.MemoryUse, int64(h.DiskBytes), int64(h.DiskOps), int64(h.NetBytes), int64(h.NetPackets), h.HostCPUIdle, int64(h.HostAvailable)); err != nil {
				return err
			}
		}
		return c.addLists(ctx, tx, machine, cycle, ms)
	})
}

// addLists adds the processes, sockets and actions, with each statement prepared once.
func (c *Cycle) addLists(ctx context.Context, tx *sql.Tx, machine, cycle, ms int64) error {
	one, err := tx.PrepareContext(ctx, `INSERT INTO processes (machine, boot, pid, start_ms, ppid, name, command, uid, user, first_ms, last_ms) VALUES (?1,?2,?3,?4,?5,?6,?7,?8,?9,?10,?10)
		ON CONFLICT (machine, boot, pid, start_ms) DO UPDATE SET last_ms = max(last_ms, excluded.last_ms), name = excluded.name, command = excluded.command, uid = excluded.uid, user = excluded.user RETURNING id`)
	if err != nil {
		return err
	}
	defer one.Close()
	sample, err := tx.PrepareContext(ctx, `INSERT OR REPLACE INTO process_samples (cycle, process, state, user_ms, system_ms, rss_bytes, threads, nice, policy, class, affinity, talks) VALUES (?,?,?,?,?,?,?,?,?,?,?,?)`)
	if err != nil {
		return err
	}
	defer sample.Close()
	for i := range c.Changed {
		p := &c.Changed[i]
		var id int64
		if err := one.QueryRowContext(ctx, machine, c.Boot, p.PID, p.StartMS, p.PPID, p.Name, p.Command, p.UID, p.User, ms).Scan(&id); err != nil {
			return err
		}
		if _, err := sample.ExecContext(ctx, cycle, id, p.State, p.UserMS, p.SystemMS, p.RSS, p.Threads, p.Nice, p.Policy, p.Class, p.Affinity, p.Talks); err != nil {
			return err
		}
	}
	for _, s := range c.Sockets {
		if _, err := tx.ExecContext(ctx, `INSERT INTO connections (cycle, process, protocol, local, remote, state, rx_bytes, tx_bytes)
			VALUES (?, (SELECT id FROM processes WHERE machine = ? AND boot = ? AND pid = ? AND start_ms = ?),?,?,?,?,?,?)`,
			cycle, machine, c.Boot, s.PID, s.StartMS, s.Protocol, s.Local, s.Remote, s.State, s.RxBytes, s.TxBytes); err != nil {
			return err
		}
	}
	for _, a := range c.Actions {
		if _, err := tx.ExecContext(ctx, `INSERT INTO actions (machine, time_ms, pid, name, rule, before, after, why, dry, error) VALUES (?,?,?,?,?,?,?,?,?,?)`,
			machine, ms, a.PID, a.Name, a.Rule, a.Before, a.After, a.Why, c.Dry, a.Err); err != nil {
			return err
		}
	}
	return nil
}

// Order is a work order: the columns of orders.
type Order struct {
	Machine, Resource, State, Why string
	Opened, Closed                time.Time // Closed is zero while it is on trial
	Before, After                 float64
	UseBefore, UseAfter           float64
}

// SetOrder records an order, in place of what is known of the one of that machine and
// resource that began at that time.
func (d *DB) SetOrder(ctx context.Context, o Order) error {
	return d.Write(ctx, func(tx *sql.Tx) error {
		machine, err := machineID(ctx, tx, o.Machine, o.Opened.UnixMilli())
		if err != nil {
			return err
		}
		closed := int64(0)
		if !o.Closed.IsZero() {
			closed = o.Closed.UnixMilli()
		}
		if _, err := tx.ExecContext(ctx, "DELETE FROM orders WHERE machine = ? AND resource = ? AND opened_ms = ?", machine, o.Resource, o.Opened.UnixMilli()); err != nil {
			return err
		}
		_, err = tx.ExecContext(ctx, `INSERT INTO orders (machine, resource, opened_ms, closed_ms, state, before, after, use_before, use_after, why) VALUES (?,?,?,?,?,?,?,?,?,?)`,
			machine, o.Resource, o.Opened.UnixMilli(), closed, o.State, o.Before, o.After, o.UseBefore, o.UseAfter, o.Why)
		return err
	})
}

// AddServiceState records a change of state (S4.9); machine "" is the whole group.
func (d *DB) AddServiceState(ctx context.Context, at time.Time, service, machine, previous, state, why string) error {
	return d.Write(ctx, func(tx *sql.Tx) error {
		_, err := tx.ExecContext(ctx, `INSERT INTO service_states (time_ms, service, machine, previous, state, why) VALUES (?,?,?,?,?,?)`, at.UnixMilli(), service, machine, previous, state, why)
		return err
	})
}
