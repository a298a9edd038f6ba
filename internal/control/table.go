package control

import (
	"fmt"
	"io"
	"strings"
	"text/tabwriter"
	"time"

	"github.com/silo-nbd/silo-nbd/internal/progress"
	"github.com/silo-nbd/silo-nbd/internal/units"
)

// WriteTable writes st for people.
func WriteTable(w io.Writer, st Status) error {
	var b strings.Builder
	fmt.Fprintf(&b, "%s\n", headline(st))
	if len(st.Disks) == 0 {
		fmt.Fprintln(&b, "no disk yet: the source has not come")
	} else {
		t := tabwriter.NewWriter(&b, 0, 0, 2, ' ', 0)
		fmt.Fprintln(t, "DISK\tSTATE\tDONE\tOF\t%\tRATE\tETA\tWAITING")
		for _, d := range st.Disks {
			fmt.Fprintln(t, strings.Join(row(d), "\t"))
		}
		t.Flush() // into memory
	}
	for _, d := range st.Disks {
		if o := d.Owner; o != nil {
			fmt.Fprintf(&b, "%s belongs to device %s%s\n", clean(d.Name), clean(o.Device), o.words())
		}
		if to := d.Destination; to != nil && d.Live != nil && !d.Live.HandedOff {
			fmt.Fprintf(&b, "%s goes to %s\n", clean(d.Name), to.words())
		}
		if d.Error != "" {
			fmt.Fprintf(&b, "%s: %s\n", d.Name, clean(d.Error))
		}
	}
	_, err := io.WriteString(w, b.String())
	return err
}

// words name a destination.
func (d *Destination) words() string {
	s := "a plain Silo"
	if d.Device != "" {
		s = "device " + clean(d.Device)
	}
	if d.Address != "" {
		s += " at " + clean(d.Address)
	}
	return s
}

// words say what is known of an owner.
func (o *Owner) words() (s string) {
	if o.At != "" {
		s = " at " + clean(o.At)
	}
	switch {
	case o.Complete:
		return s + ", which has all of it"
	case o.Taken:
		return s + ", which is live"
	}
	return s + ", which has not answered yet"
}

func headline(st Status) string {
	parts := []string{fmt.Sprintf("%s, pid %d, up %s", clean(st.Role), st.PID, progress.Clock(seconds(st.Uptime)))}
	if b := st.Background; b != nil {
		if b.RateLimit > 0 {
			parts = append(parts, fmt.Sprintf("rate at most %s/s", units.Human(b.RateLimit)))
		}
		if b.Paused {
			parts = append(parts, "paused")
		}
	}
	if n := st.NBD; n != nil {
		parts = append(parts, count(n.Clients, "NBD client"))
	}
	if n := st.Copies; n != nil {
		parts = append(parts, fmt.Sprintf("copies: %d complete, %d under way, %d unfinished", n.Complete, n.UnderWay, n.Unfinished))
	}
	if st.Draining {
		parts = append(parts, "draining")
	}
	return strings.Join(parts, ", ")
}

func count(n int, what string) string {
	if n == 1 {
		return "1 " + what
	}
	return fmt.Sprintf("%d %ss", n, what)
}

func row(d Disk) []string {
	rate, eta, waiting := "-", "-", "-"
	if d.Rate != nil {
		rate = units.Human(*d.Rate) + "/s"
	}
	if d.ETA != nil {
		eta = progress.Clock(seconds(*d.ETA))
	}
	if d.WaitingReads > 0 {
		waiting = count(d.WaitingReads, "read")
		if d.OldestWait >= 1 {
			waiting += ", " + progress.Clock(seconds(d.OldestWait))
		}
	}
	return []string{
		clean(d.Name), Words(d), units.Human(min(d.Done, d.Size)), units.Human(d.Size), fmt.Sprint(d.Percent), rate, eta, waiting,
	}
}

// Words are a disk's state and what there is to say of it.
func Words(d Disk) string {
	s := clean(d.State)
	if d.Live != nil && d.Live.Pass > 1 && !d.Live.HandedOff {
		s += fmt.Sprintf(", pass %d", d.Live.Pass)
	}
	if d.Detail != "" {
		s += " (" + clean(d.Detail) + ")"
	}
	return s
}

func seconds(s float64) time.Duration { return time.Duration(s * float64(time.Second)) }

// clean keeps a name or an error, parts of which come from others, from doing
// anything to a terminal or the table.
func clean(s string) string {
	return strings.Map(func(c rune) rune {
		if c < ' ' || c >= 0x7f && c < 0xa0 {
			return '?'
		}
		return c
	}, s)
}
