// Package monitor puts a machine's request service together (S5.7, S5.8): the
// credentials that an administrator gave, an audit log in the machine's directory,
// and the operations of docs/ports.md. It knows carriers as streams and the rest of
// a machine not at all:
//
//	m, err := monitor.New(monitor.Config{Machine: "web"})
//	if err != nil { … }
//	defer m.Close()
//	for _, c := range guest.Carriers() {
//		err = m.Attach(c.Name, c.A, c.B)
//	}
package monitor

import (
	"errors"
	"maps"
	"path/filepath"

	"github.com/gondola-vmm/gondola/snapshot/auth"
	"github.com/gondola-vmm/gondola/snapshot/service"
)

// AuditLog is the audit log's name in a machine's directory; what is older than the
// last MaxAudit bytes or so is in AuditLog.1, or gone.
const (
	AuditLog = "audit.log"
	MaxAudit = 8 << 20
)

// Config of a machine's service.
type Config struct {
	// Machine is the machine's name. Required.
	Machine string
	// Dir is where the machine's credentials, audit log and states are; ""
	// is auth.DefaultDir(Machine). It is made when something is put there.
	Dir string
	// Ops are operations beside ping, host-info, list and mark, or instead of
	// them.
	Ops map[string]service.Op
	// Limits are the machine's; zero values are the defaults.
	Limits service.Limits
}

// Monitor is a machine's request service.
type Monitor struct {
	*service.Service
	// Marks has the times that the guest marked as critical.
	Marks *service.Marks

	dir string
	log *auditLog
}

// New makes a service and lets it run. It fails with auth.ErrInvalid for a name
// that cannot be a directory's, or if there is no place for the directory.
func New(cfg Config) (*Monitor, error) {
	dir := cfg.Dir
	if dir == "" {
		var err error
		if dir, err = auth.DefaultDir(cfg.Machine); err != nil {
			return nil, err
		}
	}
	m := &Monitor{Marks: &service.Marks{}, dir: dir, log: &auditLog{path: filepath.Join(dir, AuditLog), max: MaxAudit}}
	ops := map[string]service.Op{
		service.OpHostInfo: service.HostInfo(dir),
		service.OpList:     service.List(nil),
		service.OpMark:     service.MarkOp(m.Marks),
	}
	maps.Copy(ops, cfg.Ops)
	m.Service = service.New(service.Config{
		Machine: cfg.Machine,
		Auth:    auth.Open(auth.Path(dir)),
		Ops:     ops,
		Audit:   m.log,
		Limits:  cfg.Limits,
	})
	return m, nil
}

// Dir is the machine's directory, which need not exist.
func (m *Monitor) Dir() string { return m.dir }

// Close ends the service and its carriers. It is idempotent.
func (m *Monitor) Close() error { return errors.Join(m.Service.Close(), m.log.Close()) }
